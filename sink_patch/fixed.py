"""One forward of a single token at fixed shapes and addresses, for a graph that is compiled once.

All that changes from token to token is in tensors, and is changed before the graph runs: where the token is written,
which slots are seen, its position. What the graph reads of Python is the same in each step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sink_patch.clock import RowPlan
from sink_patch.layout import LayerKind
from sink_patch.step import Step


class FixedLayout:
    """Each row writes one slot and reads all of them; a mask hides those that are empty.

    `slots` is int64 [rows], `visible` int64 [rows, length].
    """

    in_place = True
    brings_sinks = False  # they are in before such a step

    @torch.inference_mode(False)  # else what was made in inference mode could not be changed outside it
    def __init__(self, kind: LayerKind, rows: int, device: torch.device):
        self.kind = kind
        self.length = self.reach = kind.capacity
        self.slots = torch.zeros(rows, dtype=torch.long, device=device)
        self.visible = torch.zeros(rows, kind.capacity, dtype=torch.long, device=device)
        self._rows = torch.arange(rows, device=device)
        self._held: list[int] | None = None  # tokens of each row that `visible` shows; None: not known

    def prepare(self, plans: Sequence[RowPlan]) -> None:
        """Say where the next token of each row goes."""
        seen = [plan.seen for plan in plans]
        slots = [self.kind.write_runs(plan, columns=1)[0][0] for plan in plans]
        if self._held != seen:
            filled = torch.tensor([min(count, self.length) for count in seen])[:, None]  # [rows, 1]
            self.visible.copy_(torch.arange(self.length)[None, :] < filled)
        if len(set(slots)) == 1:
            self.slots.fill_(slots[0])  # a number, which needs no copy from the host
        else:
            self.slots.copy_(torch.tensor(slots))
        self.visible.scatter_(1, self.slots[:, None], 1)
        self._held = [plan.total for plan in plans]

    def write(self, buffer: torch.Tensor, states: torch.Tensor) -> None:
        """Copy states [rows, heads, 1, dim] into buffer [rows, heads, length, dim]."""
        buffer[self._rows, :, self.slots] = states[:, :, 0]  # [rows, heads, dim], which inductor does in place


class FixedStep(Step):
    """A step that is used again and again, for caches with one kind of layer.

    Args:
        kind, rows, device: of the cache.
        buffers: the keys of all layers, by which it is known whether the cache still lies where it lay.
    """

    is_fixed = True

    @torch.inference_mode(False)
    def __init__(self, kind: LayerKind, rows: int, device: torch.device, buffers: Sequence[torch.Tensor | None]):
        super().__init__((), 1, (), device)
        self.buffers = buffers
        self._layout = FixedLayout(kind, rows, device)
        self._positions = torch.zeros(rows, 1, dtype=torch.long, device=device)

    def prepare(self, plans: Sequence[RowPlan]) -> None:
        """Take the plans of the next token."""
        self._take(plans)
        self._layout.prepare(plans)
        first = [plan.first_position for plan in plans]
        if len(set(first)) == 1:
            self._positions.fill_(first[0])
        else:
            self._positions.copy_(torch.tensor(first)[:, None])
        self.touched = True  # by what the graph will do

    def layout_of(self, kind: LayerKind) -> FixedLayout:  # type: ignore[override] # noqa: ARG002
        return self._layout

    def position_ids(self) -> torch.Tensor:
        """[rows, 1], always at the same address."""
        return self._positions

    def attention_mask(self, *, explicit: bool = False) -> torch.Tensor:  # noqa: ARG002
        """[rows, length], always at the same address."""
        return self._layout.visible

    def past_columns(self) -> int:
        return self._layout.length - 1

    def mask_sizes(self, kind: LayerKind) -> tuple[int, int]:  # noqa: ARG002
        return self._layout.length, 0
