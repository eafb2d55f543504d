"""A buffer for one cached tensor: a ring behind a few fixed slots."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sink_patch.buffers.layouts import Layout
from sink_patch.buffers.rotation import Rotation, Turn
from sink_patch.rules.kinds import LayerKind


class Ring:
    """A buffer for one cached tensor, with pristine sinks where the tensor turns with position.

    `buffer` is [rows, heads, slots, dim]; it grows by doubling until it has `kind.slots` and stays in place from then
    on. `pristine` is [rows, heads, num_sink_tokens, dim]: the sinks as the model made them.
    """

    def __init__(self, kind: LayerKind, rotation: Rotation | None):
        self.kind = kind
        self.rotation = rotation
        self.buffer: torch.Tensor | None = None
        self.pristine: torch.Tensor | None = None

    def update(self, states: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Store new states [rows, heads, columns, dim]; return what this forward sees, [rows, heads, visible, dim].

        The sinks in the buffer have been turned to where it sees them (sinks.py).
        """
        stored = states.detach() if states.requires_grad else states
        buffer = self.buffer
        if buffer is None or buffer.shape[2] < layout.reach:
            buffer = self._grown(stored, layout.reach)
        seen = None if layout.in_place else layout.read(buffer, states)
        layout.write(buffer, stored)
        if layout.brings_sinks and self.pristine is not None:
            layout.write_sinks(self.pristine, stored)
        if seen is not None:
            return seen
        return buffer if layout.length == buffer.shape[2] else buffer[:, :, : layout.length]

    @property
    def has_turning_sinks(self) -> bool:
        return self.rotation is not None and self.kind.num_sink_tokens > 0

    @property
    def nbytes(self) -> int:
        held = [tensor for tensor in (self.buffer, self.pristine) if tensor is not None]
        return sum(tensor.nbytes for tensor in held)

    def fix(self) -> None:
        """Take all slots at once."""
        if self.buffer is not None and self.buffer.shape[2] < self.kind.slots:
            self._grown(self.buffer, self.kind.slots)

    def turn(self, turn: Turn) -> None:
        """Turn all keys of the ring (not the sinks, which are shown anew in each forward)."""
        if self.rotation is not None and self.buffer is not None:
            ring = self.buffer[:, :, self.kind.num_sink_tokens :]  # [rows, heads, ring, dim]
            ring.copy_(self.rotation.apply(ring, turn.cos_sin(self.rotation, ring.device)))

    @torch.inference_mode(False)  # as in `_grown`
    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep the rows `rows`, in that order (beams, batch operations)."""
        if self.buffer is not None:
            self.buffer = self.buffer.index_select(0, rows.to(self.buffer.device))
        if self.pristine is not None:
            self.pristine = self.pristine.index_select(0, rows.to(self.pristine.device))

    def reset(self) -> None:
        self.buffer = self.pristine = None

    @torch.inference_mode(False)  # as in `_grown`
    def lay_out(self, kind: LayerKind, seen: Sequence[int]) -> None:
        """Take on a kind with another number of spare slots; rows have seen `seen` tokens, which move to theirs."""
        held, self.kind, old = self.buffer, kind, self.kind
        if held is None:
            return
        reach = max(min(kind.slots, max(seen)), kind.num_sink_tokens)
        self.buffer = held.new_zeros(held.shape[0], held.shape[1], reach, held.shape[3])
        self.buffer[:, :, : kind.num_sink_tokens] = held[:, :, : kind.num_sink_tokens]
        for row, count in enumerate(seen):
            first = max(kind.num_sink_tokens, count - min(kind.ring, old.ring))
            kept = torch.arange(first, max(first, count), device=held.device)  # absolute indices
            self.buffer[row, :, _slots(kept, kind)] = held[row, :, _slots(kept, old)]  # [heads, tokens, dim]

    @torch.inference_mode(False)  # else a cache begun in inference mode could not be written to outside it
    def _grown(self, states: torch.Tensor, slots: int) -> torch.Tensor:
        """The buffer, with at least `slots` slots, in which it holds what it held."""
        held = 0 if self.buffer is None else self.buffer.shape[2]
        # the sinks' slots are there from the start, as the sinks are written as one block
        slots = min(self.kind.slots, max(slots, 2 * held, self.kind.num_sink_tokens))
        grown = states.new_zeros(states.shape[0], states.shape[1], slots, states.shape[3])
        if self.buffer is not None:
            grown[:, :, :held] = self.buffer
        self.buffer = grown
        if self.pristine is None and self.has_turning_sinks:
            self.pristine = torch.zeros_like(self.buffer[:, :, : self.kind.num_sink_tokens])
        return self.buffer


def _slots(indices: torch.Tensor, kind: LayerKind) -> torch.Tensor:
    """Where tokens that are no sinks lie, by their absolute indices."""
    return kind.num_sink_tokens + (indices - kind.num_sink_tokens) % kind.ring
