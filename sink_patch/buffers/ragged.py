"""Where a forward reads and writes when rows have seen different numbers of tokens: index tensors, and a mask."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

import torch

from sink_patch.buffers.devices import moved
from sink_patch.buffers.layouts import Layout
from sink_patch.errors import CacheStateError
from sink_patch.rules.kinds import LayerKind
from sink_patch.rules.plans import RowPlan


class RaggedLayout(Layout):
    """Rows that have seen different numbers of tokens, or bring padding. Built on the CPU, moved once per device.

    All rows are read from the right, so that one mask serves every kind of layer. A window of 4 with one sink, a row
    that has seen 2 tokens beside one that has seen 6, and one new token each (`.` is filler, which the mask hides):

        buffer of row 0:  s 1 . .     read as   . s 1 2     (2 is new)
        buffer of row 1:  s 4 5 3     read as   s 4 5 6     (6 is new, and is written over 3)

    Read in place, row 0 would have its gap at the end, where other kinds of layers cannot follow and where some models
    take it for padding. So the buffer itself is read only where no row has a gap.
    """

    def __init__(self, kind: LayerKind, plans: Sequence[RowPlan], columns: int):
        self.kind, self.columns = kind, columns
        self.filled = [kind.past(plan) + plan.new for plan in plans]  # visible columns of each row
        readable = kind.is_the_buffer(columns) or all(kind.is_in_order(plan) for plan in plans)
        single_tokens = columns == 1 and not kind.ordered and all(plan.new == 1 for plan in plans)
        self.in_place = readable and single_tokens and len(set(self.filled)) == 1
        self.length = max(*self.filled, 0 if self.in_place else columns)
        self.all_visible = min(self.filled) == self.length
        triples = [
            (row, slot + step, column + step)
            for row, plan in enumerate(plans)
            for slot, column, length in kind.write_runs(plan, columns)
            for step in range(length)
        ]
        writes = torch.tensor(triples, dtype=torch.long, device="cpu")
        self._writes = writes.reshape(-1, 3)  # [tokens, (row, slot, column)]
        self.brings_sinks = any(slot < kind.num_sink_tokens for _, slot, _ in triples)
        self.reach = max((slot + 1 for _, slot, _ in triples), default=0)
        self._sources = None if self.in_place else self._source_index(kind, plans, columns)  # [rows, length]
        self._devices: dict[torch.device, tuple[torch.Tensor, ...]] = {}

    def write(self, buffer: torch.Tensor, states: torch.Tensor) -> None:
        rows, slots, columns = self._on(buffer.device)[0].unbind(1)
        buffer[rows, :, slots] = states[rows, :, columns]  # [tokens, heads, dim]

    def write_sinks(self, pristine: torch.Tensor, states: torch.Tensor) -> None:
        rows, slots, columns = moved(self._sink_writes, pristine.device).unbind(1)
        pristine[rows, :, slots] = states[rows, :, columns]  # [tokens, heads, dim]

    def read(self, buffer: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Each row right-aligned: filler, visible past in stream order, new tokens: [rows, heads, length, dim]."""
        sources = self._on(buffer.device)[1][:, None, :, None]  # [rows, 1, length, 1]
        everything = torch.cat((states, buffer), dim=2)  # [rows, heads, columns + slots, dim]
        return torch.take_along_dim(everything, sources, dim=2)

    def _source_index(self, kind: LayerKind, plans: Sequence[RowPlan], columns: int) -> torch.Tensor:
        """For each visible column its place in cat(new tokens, buffer); filler, masked, points at the last new one."""
        index = torch.full((len(plans), self.length), columns - 1, dtype=torch.long, device="cpu")
        for row, plan in enumerate(plans):
            past = [columns + slot + step for slot, length in kind.past_runs(plan) for step in range(length)]
            new = range(columns - plan.new, columns)
            visible = torch.tensor([*past, *new], dtype=torch.long, device="cpu")
            if visible.numel():
                index[row, -visible.numel() :] = visible
        return index

    @cached_property
    def _sink_writes(self) -> torch.Tensor:
        return self._writes[self._writes[:, 1] < self.kind.num_sink_tokens]

    def _on(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        if device not in self._devices:
            sources = self._writes[:0] if self._sources is None else self._sources
            self._devices[device] = (moved(self._writes, device), moved(sources, device))
        return self._devices[device]


def visible_columns(layouts: Iterable[Layout], columns: int) -> torch.Tensor:
    """Which of the last `columns` mask coordinates each row sees, [rows, columns], for all kinds of layers at once.

    Each kind reads as many of them as it has, from the right. A sliding window may be offered more than it holds: the
    model's own mask of the window hides the rest. Where rows see 3 and 5 tokens, and `columns` is 6:

        row 0   . . . x x x
        row 1   . x x x x x

    Raises:
        CacheStateError: the kinds of layers cannot share one mask.
    """
    ragged = [layout for layout in layouts if isinstance(layout, RaggedLayout)]
    filled = [max(of_row) for of_row in zip(*(layout.filled for layout in ragged), strict=True)]
    for layout in ragged:
        offered = [min(count, layout.length) for count in filled]
        if offered != layout.filled and not layout.kind.local:
            raise CacheStateError(
                "The rows of this forward bring different numbers of new tokens, some more than "
                f"{layout.kind.ring}, to a model with sliding windows: one mask cannot say that. Feed pieces of "
                f"{layout.kind.ring} columns or fewer."
            )
    column = torch.arange(columns, device="cpu")[None, :]  # [1, columns]
    count = torch.tensor(filled, device="cpu")[:, None]  # [rows, 1]
    return column >= columns - count
