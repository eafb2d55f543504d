"""Two forwards of one token show how position enters what a model caches.

With one token and no past, attention returns that token's value, whatever its position. So every hidden state is the
same at position p and at p + delta, and what each layer caches differs by exactly the rotation by delta. This checks
the adapter of every layer of any model on its real weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sink_patch.buffers.rotation import Rotation
from sink_patch.compat import Cached, Entry, installed_shim
from sink_patch.errors import UnsupportedModelError
from sink_patch.models.adapters.adapter import Adapter
from sink_patch.models.entries import text_config
from sink_patch.models.probe.calls import NUM_TOKENS, probe_tokens, run

# At larger distances the model's own float32 angles are off by more than the tolerance; a frequency that turns less
# than the tolerance over this distance cannot be told from another one, and does no harm either.
LONGEST_DELTA = 8192
_FIRST_POSITION = 1


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
            if found > allowed:
                return f"its {name} are off by {found:.2g} of their size (at most {allowed:.2g} can be rounding)"
        return None


def read(
    model: nn.Module, max_position: int, entries: Sequence[Entry], *, positions: bool, rows: int = NUM_TOKENS
) -> Iterator[list[Reading | None]]:
    """Readings of more and more tokens: one for each entry of the model's cache, None for an entry that stays empty.

    Each costs two forwards. With four rows or more, the first is of all tokens, and the last; with fewer it is of so
    many tokens, as much as a cache mostly shows, and those after it are for whom that is not enough.

    Args:
        model: unchanged by it, as is the state of random number generators.
        max_position: the largest position that may be given to the model.
        entries: of the model's cache.
        positions: whether its forward takes `position_ids`; if not, position does not show in the cache.
        rows: of each forward. What stands around a model may be made for so many (PEFT, with an adapter for each row).

    Raises:
        UnsupportedModelError: the model has room for fewer than two positions, or positions cannot be given to it.
    """
    delta = min(LONGEST_DELTA, max_position - _FIRST_POSITION)
    if delta < 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} has room for {max_position + 1} positions only: too few to see how its keys turn. "
            "Use another cache_implementation."
        )
    forwards = -(-NUM_TOKENS // rows)
    token_ids = probe_tokens(model, rows * forwards).reshape(rows, forwards).T[..., None]  # far apart in a forward
    found: list[Reading | None] = []
    for some in token_ids:  # [rows, 1]
        before, after = (
            _cached(model, some, position if positions else None, len(entries))
            for position in (_FIRST_POSITION, _FIRST_POSITION + delta)
        )
        new = [_reading(*pair, delta) for pair in zip(before, after, strict=True)]
        found = [_joined(*pair) for pair in zip(found, new, strict=True)] if found else new
        yield found


def _reading(before: Cached, after: Cached, delta: int) -> Reading | None:
    return None if before is None or after is None else Reading((before[0], after[0]), (before[1], after[1]), delta)


def _joined(one: Reading | None, two: Reading | None) -> Reading | None:
    """Of the tokens of both."""
    if one is None or two is None:
        return None
    keys, values = (
        (torch.cat((first[0], second[0])), torch.cat((first[1], second[1])))
        for first, second in ((one.keys, two.keys), (one.values, two.values))
    )
    return Reading(keys, values, one.delta)


def error(states: tuple[torch.Tensor, torch.Tensor], rotation: Rotation | None, delta: int) -> float:
    """Largest deviation of any dim from the claimed rotation, relative to its size; median over the tokens."""
    before, after = (tensor.float() for tensor in states)  # [rows, heads, 1, dim]
    predicted = before
    if rotation is not None:
        if rotation.start + rotation.rotary_dim > before.shape[-1]:
            return float("inf")
        predicted = rotation.apply(before, rotation.cos_sin(torch.tensor([delta], device="cpu"), before.device))
    head = before.square().mean(dim=(1, 2, 3), keepdim=True)  # [rows, 1, 1, 1]
    dims = (before.square() + predicted.square()).mean(dim=1, keepdim=True)  # [rows, 1, 1, dim]
    deviation = (after - predicted).square().mean(dim=1, keepdim=True)  # [rows, 1, 1, dim]
    relative = (deviation / (dims + 0.01 * head)).sqrt().amax(dim=(1, 2, 3))  # [rows]; NaN where all is zero
    return relative.nan_to_num(nan=float("inf")).median().item()  # of four, two good ones will do


def tolerance(dtype: torch.dtype) -> float:
    """The largest error that rounding in the model explains: about 8 units in the last place, at least 2e-3."""
    return max(2e-3, 8 * torch.finfo(dtype).eps)  # angles are in float32 at best


def _cached(model: nn.Module, token_ids: torch.Tensor, position: int | None, count: int) -> list[Cached]:
    """(keys, values) of each of `count` entries for tokens [rows, 1] at one position and no past."""
    shim = installed_shim()
    cache = shim.probe_cache(text_config(model))
    run(model, token_ids, None if position is None else torch.full_like(token_ids[:1], position), cache)
    cached = list(shim.cached(cache))
    return cached + [None] * (count - len(cached))  # a cache may grow only as far as it is used
