"""A buffer for one cached tensor of one layer: a ring behind a few fixed slots."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Protocol

import torch

from sink_patch.buffers.layouts import Layout
from sink_patch.buffers.rotation import Rotation, Turn
from sink_patch.rules.kinds import LayerKind


class SinkOwner(Protocol):
    """Who keeps the sinks of a ring as the model made them (`Sinks`, sinks/owner.py)."""

    def take(self, ring: Ring, states: torch.Tensor, layout: Layout) -> None:
        """Keep the sinks among new states [rows, heads, columns, dim]."""

    def buffer_replaced(self) -> None:
        """A ring has another buffer, or none: hold the old one no longer."""


class Ring:
    """A buffer for one cached tensor, in which nothing moves.

    `buffer` is [rows, heads, slots, dim]; it grows by doubling until it has all slots of its layer's kind, and stays
    where it is from then on. The first slots are the sinks', turned to where the forward sees them.

    Args:
        rotation: how the tensor turns with position; None: it does not.
    """

    def __init__(self, rotation: Rotation | None):
        self.rotation = rotation
        self.buffer: torch.Tensor | None = None
        self.pristine: torch.Tensor | None = None  # its sinks as the model made them; set by its owner
        self._owner: weakref.ref[SinkOwner] | None = None  # of its sinks, where they turn with position; it holds us

    @property
    def owner(self) -> SinkOwner | None:
        return None if self._owner is None else self._owner()

    @owner.setter
    def owner(self, owner: SinkOwner) -> None:
        self._owner = weakref.ref(owner)

    def update(self, states: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Store new states [rows, heads, columns, dim]; return what this forward sees, [rows, heads, visible, dim]."""
        stored = states.detach() if states.requires_grad else states
        buffer = self.buffer
        if buffer is not None and stored.dtype != buffer.dtype:
            wider = torch.promote_types(buffer.dtype, stored.dtype)
            buffer = buffer if wider == buffer.dtype else self.widen(buffer, wider)
        slots = 0 if buffer is None else buffer.shape[2]
        if buffer is None or slots < layout.reach:
            buffer = self.grow(stored, layout.kind, layout.reach)
            slots = buffer.shape[2]
        seen = None if layout.in_place else layout.read(buffer, states)
        layout.write(buffer, stored)
        if layout.brings_sinks and (owner := self.owner) is not None:
            owner.take(self, stored, layout)
        if seen is not None:
            return seen
        return buffer if layout.length == slots else buffer[:, :, : layout.length]

    @torch.inference_mode(False)  # else a cache begun in inference mode could not be written to outside it
    def grow(self, states: torch.Tensor, kind: LayerKind, slots: int) -> torch.Tensor:
        """The buffer, with at least `slots` slots and what it held; states [rows, heads, ..., dim] tell its shape."""
        held = 0 if self.buffer is None else self.buffer.shape[2]
        # the sinks' slots are there from the start, as the sinks are written as one block
        slots = min(kind.slots, max(slots, 2 * held, kind.num_sink_tokens))
        grown = states.new_zeros(states.shape[0], states.shape[1], slots, states.shape[3])
        if self.buffer is not None:
            grown[:, :, :held] = self.buffer
        self.replace(grown)
        return grown

    @torch.inference_mode(False)  # as in `grow`
    def widen(self, buffer: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The buffer in a wider dtype: what was begun under autocast, say, goes on without it."""
        widened = buffer.to(dtype)
        self.replace(widened)
        return widened

    def take_all_slots(self, kind: LayerKind) -> None:
        """Grow to the end at once."""
        if self.buffer is not None and self.buffer.shape[2] < kind.slots:
            self.grow(self.buffer, kind, kind.slots)

    def turn(self, turn: Turn, kind: LayerKind) -> None:
        """Turn all keys of the ring (not the sinks, which are shown anew in each forward)."""
        if self.rotation is not None and self.buffer is not None:
            ring = self.buffer[:, :, kind.num_sink_tokens :]  # [rows, heads, ring, dim]
            ring.copy_(self.rotation.apply(ring, turn.cos_sin(self.rotation, ring.device)))

    @torch.inference_mode(False)  # as in `grow`
    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep the rows `rows`, in that order (beams, batch operations)."""
        if self.buffer is not None:
            self.replace(self.buffer.index_select(0, rows.to(self.buffer.device)))

    def reset(self) -> None:
        self.replace(None)

    @torch.inference_mode(False)  # as in `grow`
    def lay_out(self, old: LayerKind, new: LayerKind, seen: Sequence[int]) -> None:
        """Go from one number of spare slots to another; rows count `seen` tokens, which move to their new slots."""
        held, sinks = self.buffer, new.num_sink_tokens
        if held is None:
            return
        reach = max(min(new.slots, max(seen)), sinks)
        laid_out = held.new_zeros(held.shape[0], held.shape[1], reach, held.shape[3])
        laid_out[:, :, :sinks] = held[:, :, :sinks]
        for row, count in enumerate(seen):
            first = max(sinks, count - min(new.ring, old.ring))
            kept = torch.arange(first, max(first, count), device=held.device)
            laid_out[row, :, _slots(kept, new)] = held[row, :, _slots(kept, old)]  # [heads, tokens, dim]
        self.replace(laid_out)

    def move_to_front(self, kind: LayerKind, before: Sequence[int], after: Sequence[int]) -> None:
        """Let tokens behind the sinks leave: rows had seen `before` tokens, and are as if they had seen `after`.

        The newest ones move to the slots behind the sinks, in order; the buffer stays where it is.
        """
        held, sinks = self.buffer, kind.num_sink_tokens
        if held is None:
            return
        for row, (seen, count) in enumerate(zip(before, after, strict=True)):
            if count < seen:
                stay = torch.arange(sinks + seen - count, seen, device=held.device)
                moved = held[row].index_select(1, _slots(stay, kind))  # [heads, tokens, dim]
                held[row, :, sinks:count] = moved

    def replace(self, buffer: torch.Tensor | None) -> None:
        """The one way to another buffer [rows, heads, slots, dim], so that nobody has to be told but here."""
        self.buffer = buffer
        if (owner := self.owner) is not None:
            owner.buffer_replaced()


@torch.inference_mode(False)  # as in `Ring.grow`
def stacked(upper: torch.Tensor | None, lower: torch.Tensor | None, rows: tuple[int, int]) -> torch.Tensor | None:
    """A copy of the rows of two tensors [rows, heads, slots, dim], one below the other.

    Slots that one of them does not have yet are zeros there.

    Args:
        rows: of each; None in place of a tensor stands for zeros, and both of them for no tensor.
    """
    held = [one for one in (upper, lower) if one is not None]
    if not held:
        return None
    _, heads, _, dim = held[0].shape
    joined = held[0].new_zeros(sum(rows), heads, max(one.shape[2] for one in held), dim)
    for first, one in ((0, upper), (rows[0], lower)):
        if one is not None:
            joined[first : first + len(one), :, : one.shape[2]] = one
    return joined


def _slots(indices: torch.Tensor, kind: LayerKind) -> torch.Tensor:
    """Where tokens that are no sinks lie, by how a kind counts them."""
    return kind.num_sink_tokens + (indices - kind.num_sink_tokens) % kind.ring
