"""Two forwards of one token tell how position enters what a model caches.

With one token and no past, attention returns that token's value whatever its position. So every hidden state is the
same at position p and at p + delta, and what every layer caches differs by exactly the rotation by delta. This checks
the adapter of every layer of any model on its real weights, and finds one for a model that no family claims.
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
from sink_patch.errors import AdapterMismatchError, UnsupportedModelError
from sink_patch.models.adapters.adapter import Adapter
from sink_patch.models.adapters.rope import frequency_buffers, no_positions
from sink_patch.models.entries import cache_argument, decoder_of, input_device, text_config

_FIRST_POSITION = 1
# At larger distances the model's own float32 angles are off by more than the tolerance; a frequency that turns less
# than the tolerance over this distance cannot be told from another one, and does no harm either.
_LONGEST_DELTA = 8192
_NUM_TOKENS = 4  # rows of the probe; the median over them counts, as experts may be chosen differently once by rounding


@dataclass(frozen=True)
class Reading:
    """What one layer cached for the same tokens at two positions, `delta` apart: [rows, heads, 1, dim] each."""

    keys: tuple[torch.Tensor, torch.Tensor]
    values: tuple[torch.Tensor, torch.Tensor]
    delta: int

    def mismatch(self, adapter: Adapter) -> str | None:
        """What does not fit, for people; None where the adapter is right."""
        for name, states, rotation in (("keys", self.keys, adapter.keys), ("values", self.values, adapter.values)):
            found = error(states, rotation, self.delta)
            allowed = tolerance(states[0].dtype)
            if not found <= allowed:  # a NaN does not fit either
                return f"its {name} are off by {found:.2g} of their size (at most {allowed:.2g} can be rounding)"
        return None


def read(model: nn.Module, max_position: int, entries: Sequence[Entry], *, positions: bool) -> list[Reading | None]:
    """Run the two forwards; one reading for each entry of the model's cache, None for one that stays empty.

    Args:
        max_position: the largest position that may be given to the model.
        entries: those of its cache.
        positions: whether its forward takes `position_ids`; where it does not, position shows nowhere in the cache.
    """
    delta = min(_LONGEST_DELTA, max_position - _FIRST_POSITION)
    if delta < 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} has room for {max_position + 1} positions only: too few to see how its keys turn."
        )
    token_ids = _tokens(model)
    with torch.no_grad(), _same_dropout(model):
        before = _cached(model, token_ids, _FIRST_POSITION if positions else None)
    with torch.no_grad(), _same_dropout(model):
        after = _cached(model, token_ids, _FIRST_POSITION + delta if positions else None)
    readings: list[Reading | None] = [
        None if first is None or second is None else Reading((first[0], second[0]), (first[1], second[1]), delta)
        for first, second in zip(before, after, strict=True)
    ]
    return readings + [None] * (len(entries) - len(readings))  # a cache may grow only as far as it is used


def fits(readings: Sequence[Reading | None], entries: Sequence[Entry], adapters: Sequence[Adapter]) -> bool:
    """Whether every adapter is what the model does."""
    return all(
        not entry.attention or (reading is not None and reading.mismatch(adapter) is None)
        for reading, entry, adapter in zip(readings, entries, adapters, strict=True)
    )


def verify(
    readings: Sequence[Reading | None], entries: Sequence[Entry], adapters: Sequence[Adapter], family: str
) -> None:
    """Raise `AdapterMismatchError`, naming the layer, unless every adapter is what the model does."""
    for layer_idx, (reading, entry, adapter) in enumerate(zip(readings, entries, adapters, strict=True)):
        if not entry.attention:
            continue
        found = "it caches nothing" if reading is None else reading.mismatch(adapter)
        if found is not None:
            raise AdapterMismatchError(
                f"The model's cache does not turn as the family {family!r} says ({adapter.describe()}). In layer "
                f"{layer_idx} {found}. Streaming would give wrong text, so it is refused. If this is a variant of "
                "that family, register it under its own model_type: sink_patch.register_family."
            )


def choose(model: nn.Module, entries: Sequence[Entry], readings: Sequence[Reading | None]) -> list[Adapter]:
    """An adapter for each layer of a model that no family claims, among the known conventions.

    Raises:
        UnsupportedModelError: nothing fits, or no layer turns at all (then position enters in some other way).
    """
    candidates = _candidates(model, readings)
    chosen = []
    for layer_idx, (entry, reading) in enumerate(zip(entries, readings, strict=True)):
        if not entry.attention:
            chosen.append(no_positions())
            continue
        fitting = [] if reading is None else [adapter for adapter in candidates if reading.mismatch(adapter) is None]
        if not fitting:
            raise UnsupportedModelError(
                f"No family is registered for {text_config(model).model_type!r}, and in layer {layer_idx} the cache "
                "turns in none of the known ways. Register a family with an adapter: sink_patch.register_family."
            )
        chosen.append(fitting[0])
    if not any(adapter.turns for adapter in chosen):
        raise UnsupportedModelError(
            f"No family is registered for {text_config(model).model_type!r}, and none of its keys turns with position, "
            "so position enters in a way that the cache does not show (ALiBi, learned or relative positions)."
        )
    return chosen


def check_distance_only(model: nn.Module, max_position: int) -> None:
    """Raise unless a short text gives the same states wherever it stands: attention must know distances alone."""
    token_ids = _tokens(model).T  # [1, tokens]
    length = token_ids.shape[1]
    shift = min(_LONGEST_DELTA, max_position - length)
    near, far = (_hidden(model, token_ids, start) for start in (0, shift))
    found = ((near - far).norm() / near.norm()).item()
    allowed = 4 * tolerance(near.dtype)
    if not found <= allowed:
        raise UnsupportedModelError(
            f"{type(model).__name__} gives other states for the same text at another place (off by {found:.2g}): its "
            "attention depends on more than distance, so a stream whose positions are set back would be wrong."
        )


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
    """What rounding in the model may amount to: about 8 units in the last place, and float32 angles at any rate."""
    return max(2e-3, 8 * torch.finfo(dtype).eps)


def _candidates(model: nn.Module, readings: Sequence[Reading | None]) -> list[Adapter]:
    filled = [reading for reading in readings if reading is not None]
    head_dims = {pair[0].shape[-1] for reading in filled for pair in (reading.keys, reading.values)}
    candidates = [no_positions()]
    for buffer in frequency_buffers(model).values():
        inv_freq = buffer.detach().to(device="cpu", dtype=torch.float64)
        starts = {0} | {dim - 2 * inv_freq.numel() for dim in head_dims if dim > 2 * inv_freq.numel()}
        candidates += [
            Adapter(**{cached_in: Rotation(inv_freq, pairing, start, sign)})
            for cached_in in ("keys", "values")
            for pairing in ("half", "interleaved")
            for start in sorted(starts)
            for sign in (1, -1)
        ]
    return candidates


def _cached(model: nn.Module, token_ids: torch.Tensor, position: int | None) -> list[Cached]:
    """(keys, values) of each layer for tokens [rows, 1] at one position and no past."""
    shim = installed_shim()
    cache = shim.probe_cache(text_config(model))
    given = {} if position is None else {"position_ids": torch.full_like(token_ids[:1], position)}  # [1, 1]
    decoder = decoder_of(model)
    decoder(input_ids=token_ids, use_cache=True, **given, **{cache_argument(decoder): cache})
    return list(shim.cached(cache))


def _hidden(model: nn.Module, token_ids: torch.Tensor, start: int) -> torch.Tensor:
    """Last hidden states of tokens [1, tokens] from a position on, without a cache."""
    position_ids = torch.arange(start, start + token_ids.shape[1], device=token_ids.device)[None, :]
    with torch.no_grad(), _same_dropout(model):
        hidden: torch.Tensor = decoder_of(model)(input_ids=token_ids, position_ids=position_ids, use_cache=False)[0]
    return hidden


def _tokens(model: nn.Module) -> torch.Tensor:
    """A few token ids spread over the vocabulary, [rows, 1]; not the padding token, whose embedding may be zero."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    vocab_size = embedding.weight.shape[0]
    ids = [(2 * row + 1) * vocab_size // (2 * _NUM_TOKENS) for row in range(_NUM_TOKENS)]
    padding = getattr(text_config(model), "pad_token_id", None)
    ids = [(token + 1) % vocab_size if token == padding else token for token in ids]
    return torch.tensor(ids, device=input_device(model))[:, None]


@contextlib.contextmanager
def _same_dropout(model: nn.Module) -> Iterator[None]:
    """In training mode both forwards must drop the same units; the caller's random state is put back."""
    if not model.training:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
