"""Two forwards of one token show how position enters what a model caches.

With one token and no past, attention returns that token's value, whatever its position. So every hidden state is the
same at position p and at p + delta, and what each layer caches differs by exactly the rotation by delta. This checks
the adapter of every layer of any model on its real weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sink_patch.buffers.rotation import Rotation
from sink_patch.compat import Cached, Entry, installed_shim
from sink_patch.errors import UnsupportedModelError
from sink_patch.models.adapters.adapter import Adapter
from sink_patch.models.entries import cache_argument, decoder_of, input_device, text_config

# At larger distances the model's own float32 angles are off by more than the tolerance; a frequency that turns less
# than the tolerance over this distance cannot be told from another one, and does no harm either.
LONGEST_DELTA = 8192
_FIRST_POSITION = 1
_NUM_TOKENS = 4  # rows of the probe; the median over them counts: rounding may send one token to other experts


@dataclass(frozen=True)
class Reading:
    """What one layer cached for the same tokens at two positions, `delta` apart: [rows, heads, 1, dim] each."""

    keys: tuple[torch.Tensor, torch.Tensor]
    values: tuple[torch.Tensor, torch.Tensor]
    delta: int

    def mismatch(self, adapter: Adapter) -> str | None:
        """What does not fit, for error messages; None where the adapter is right."""
        for name, states, rotation in (("keys", self.keys, adapter.keys), ("values", self.values, adapter.values)):
            found = error(states, rotation, self.delta)
            allowed = tolerance(states[0].dtype)
            if not found <= allowed:  # a NaN does not fit either
                return f"its {name} are off by {found:.2g} of their size (at most {allowed:.2g} can be rounding)"
        return None


def read(model: nn.Module, max_position: int, entries: Sequence[Entry], *, positions: bool) -> list[Reading | None]:
    """Run the two forwards; one reading for each entry of the model's cache, None for an entry that stays empty.

    Args:
        model: unchanged by it, as is the state of random number generators.
        max_position: the largest position that may be given to the model.
        entries: of the model's cache.
        positions: whether its forward takes `position_ids`; if not, position does not show in the cache.

    Raises:
        UnsupportedModelError: the model has room for fewer than two positions.
    """
    delta = min(LONGEST_DELTA, max_position - _FIRST_POSITION)
    if delta < 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} has room for {max_position + 1} positions only: too few to see how its keys turn. "
            "Use another cache_implementation."
        )
    token_ids = probe_tokens(model)
    before = _cached(model, token_ids, _FIRST_POSITION if positions else None)
    after = _cached(model, token_ids, _FIRST_POSITION + delta if positions else None)
    readings: list[Reading | None] = [
        None if first is None or second is None else Reading((first[0], second[0]), (first[1], second[1]), delta)
        for first, second in zip(before, after, strict=True)
    ]
    return readings + [None] * (len(entries) - len(readings))  # a cache may grow only as far as it is used


def error(states: tuple[torch.Tensor, torch.Tensor], rotation: Rotation | None, delta: int) -> float:
    """Largest deviation of any dim from the claimed rotation, relative to its size; median over the tokens."""
    before, after = (tensor.float() for tensor in states)  # [rows, heads, 1, dim]
    predicted = before
    if rotation is not None:
        if rotation.start + rotation.rotary_dim > before.shape[-1]:
            return float("inf")
        predicted = rotation.apply(before, rotation.cos_sin(torch.tensor([delta]), before.device))
    head = before.square().mean(dim=(1, 2, 3), keepdim=True)  # [rows, 1, 1, 1]
    dims = (before.square() + predicted.square()).mean(dim=1, keepdim=True)  # [rows, 1, 1, dim]
    deviation = (after - predicted).square().mean(dim=1, keepdim=True)  # [rows, 1, 1, dim]
    relative = (deviation / (dims + 0.01 * head)).sqrt().amax(dim=(1, 2, 3))  # [rows]; NaN where all is zero
    return relative.median().item()


def tolerance(dtype: torch.dtype) -> float:
    """The largest error that rounding in the model explains: about 8 units in the last place, at least 2e-3."""
    return max(2e-3, 8 * torch.finfo(dtype).eps)  # angles are in float32 at best


def probe_tokens(model: nn.Module) -> torch.Tensor:
    """A few token ids spread over the vocabulary, [rows, 1]; not the padding token, whose embedding may be zero."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    vocab_size = embedding.weight.shape[0]
    ids = [(2 * row + 1) * vocab_size // (2 * _NUM_TOKENS) for row in range(_NUM_TOKENS)]
    padding = getattr(text_config(model), "pad_token_id", None)
    ids = [(token + 1) % vocab_size if token == padding else token for token in ids]
    return torch.tensor(ids, device=input_device(model))[:, None]


@contextlib.contextmanager
def no_trace(model: nn.Module) -> Iterator[None]:
    """A forward inside leaves no gradients, and in training mode drops the same units each time.

    The caller's random state is put back.
    """
    with torch.no_grad():
        if not model.training:
            yield
            return
        with torch.random.fork_rng():
            torch.manual_seed(0)
            yield


def _cached(model: nn.Module, token_ids: torch.Tensor, position: int | None) -> list[Cached]:
    """(keys, values) of each layer for tokens [rows, 1] at one position and no past."""
    shim = installed_shim()
    cache = shim.probe_cache(text_config(model))
    given = {} if position is None else {"position_ids": torch.full_like(token_ids[:1], position)}  # [1, 1]
    decoder = decoder_of(model)
    with no_trace(model):
        decoder(input_ids=token_ids, use_cache=True, **given, **{cache_argument(decoder): cache})
    return list(shim.cached(cache))
