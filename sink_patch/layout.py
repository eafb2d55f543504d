"""Where the tokens of one forward are read and written in the buffers of one kind of layer.

A buffer is a ring behind a few fixed slots: absolute index i lies in slot `i if i < S else S + (i - S) % (C - S)`, with
C the slots and S the sinks of the layer's kind. Two layouts share one interface: `UniformLayout` (all rows of the
batch are in step: slices only) and `RaggedLayout` (they are not: index tensors and a mask).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from sink_patch.clock import RowPlan
from sink_patch.errors import CacheStateError
from sink_patch.transfer import moved

Run = tuple[int, int, int]  # (first slot, first column of the forward, length)


@dataclass(frozen=True)
class LayerKind:
    """What a layer holds: `capacity` tokens, the first `num_sink_tokens` of them for good.

    A `local` kind is a sliding window shorter than the cache's: it sees its own window, as the model was trained. An
    `ordered` kind is always read in stream order, because the model takes distances from the order of the keys (ALiBi).
    In `spare` more slots the tokens that have left the window last stay for a while, unseen: they come back when newer
    ones are taken back.
    """

    capacity: int
    num_sink_tokens: int
    local: bool = False
    ordered: bool = False
    spare: int = 0

    @property
    def slots(self) -> int:
        return self.capacity + self.spare

    @property
    def ring(self) -> int:
        return self.slots - self.num_sink_tokens

    def slots_of(self, indices: torch.Tensor) -> torch.Tensor:
        """Where tokens that are no sinks lie, by their absolute indices."""
        return self.num_sink_tokens + (indices - self.num_sink_tokens) % self.ring

    def past(self, plan: RowPlan) -> int:
        """How many cached tokens the forward sees."""
        return min(plan.seen, self.capacity - min(plan.new, 1)) if self.local else plan.past

    def evicts(self, plan: RowPlan) -> bool:
        """Whether a token that the layer sees is overwritten."""
        return plan.seen > 0 and plan.total > self.capacity and plan.new > self.spare

    def is_in_order(self, plan: RowPlan) -> bool:
        """Whether what the forward sees lies in the first slots, one after the other, when it is stored."""
        return plan.total <= self.capacity

    def is_the_buffer(self, columns: int) -> bool:
        """Whether what the forward sees is all that is in the buffer, in whatever order."""
        return columns == 1 and not self.ordered and not self.spare

    def past_runs(self, plan: RowPlan) -> list[tuple[int, int]]:
        """(slot, length) of the visible past in stream order: sinks, then the newest others."""
        sinks = min(plan.seen, self.num_sink_tokens, self.past(plan))
        recent = self.past(plan) - sinks
        runs = [(0, sinks), *self._ring_runs(plan.seen - recent, recent)]
        return [run for run in runs if run[1] > 0]

    def write_runs(self, plan: RowPlan, columns: int) -> list[Run]:
        """The tokens of the forward that stay, as runs; padding, if any, is to the left of a row's tokens."""
        first_column = columns - plan.new - plan.seen  # column of absolute index 0
        sinks = max(0, min(self.num_sink_tokens, plan.total) - plan.seen)
        start = max(plan.seen + sinks, plan.total - self.ring)
        runs = [(plan.seen, plan.seen + first_column, sinks)]
        index = start
        for slot, length in self._ring_runs(start, plan.total - start):
            runs.append((slot, index + first_column, length))
            index += length
        return [run for run in runs if run[2] > 0]

    def _ring_runs(self, start: int, count: int) -> list[tuple[int, int]]:
        """Slots of the absolute indices start, ..., start + count - 1, none of them a sink's; at most one wrap."""
        if count <= 0:
            return []
        offset = (start - self.num_sink_tokens) % self.ring
        before_wrap = min(count, self.ring - offset)
        return [(self.num_sink_tokens + offset, before_wrap), (self.num_sink_tokens, count - before_wrap)]


class UniformLayout:
    """All rows of the batch have seen equally much and bring no padding."""

    all_visible = True

    def __init__(self, kind: LayerKind, plan: RowPlan, columns: int):
        self.length = kind.past(plan) + columns
        self.in_place = kind.is_in_order(plan) or kind.is_the_buffer(columns)
        self._writes = kind.write_runs(plan, columns)
        self._reads = () if self.in_place else kind.past_runs(plan)
        self._num_sink_tokens = kind.num_sink_tokens
        self.brings_sinks = any(slot < kind.num_sink_tokens for slot, _, _ in self._writes)
        self.reach = max((slot + length for slot, _, length in self._writes), default=0)

    def write(self, buffer: torch.Tensor, states: torch.Tensor) -> None:
        """Copy the tokens that stay from states [rows, heads, columns, dim] to buffer [rows, heads, slots, dim]."""
        for slot, column, length in self._writes:
            stays = states if length == states.shape[2] else states[:, :, column : column + length]
            buffer[:, :, slot : slot + length] = stays

    def write_sinks(self, pristine: torch.Tensor, states: torch.Tensor) -> None:
        """The same for the sinks alone, into a tensor [rows, heads, num_sink_tokens, dim]."""
        for slot, column, length in self._writes:
            if slot < self._num_sink_tokens:
                pristine[:, :, slot : slot + length] = states[:, :, column : column + length]

    def read(self, buffer: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """The visible past in stream order, then the new tokens: [rows, heads, length, dim]."""
        past = [buffer[:, :, slot : slot + length] for slot, length in self._reads]
        return torch.cat([*past, states], dim=2) if past else states


class RaggedLayout:
    """Rows that have seen different numbers of tokens, or bring padding. Built on the CPU, moved once per device.

    Read in place, a row that is not full would have its gap at the end, where other kinds of layers cannot follow and
    where the models of 4.52 suspect padding. So all are read from the right, and in place where there is no gap.
    """

    def __init__(self, kind: LayerKind, plans: Sequence[RowPlan], columns: int):
        self.kind = kind
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
        self._writes = torch.tensor(triples, dtype=torch.long).reshape(-1, 3)  # [tokens, (row, slot, column)]
        self._num_sink_tokens = kind.num_sink_tokens
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
        index = torch.full((len(plans), self.length), columns - 1, dtype=torch.long)
        for row, plan in enumerate(plans):
            past = [columns + slot + step for slot, length in kind.past_runs(plan) for step in range(length)]
            new = range(columns - plan.new, columns)
            visible = torch.tensor([*past, *new], dtype=torch.long)
            if visible.numel():
                index[row, -visible.numel() :] = visible
        return index

    @cached_property
    def _sink_writes(self) -> torch.Tensor:
        return self._writes[self._writes[:, 1] < self._num_sink_tokens]

    def _on(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        if device not in self._devices:
            sources = self._writes[:0] if self._sources is None else self._sources
            self._devices[device] = (moved(self._writes, device), moved(sources, device))
        return self._devices[device]


Layout = UniformLayout | RaggedLayout


def make_layouts(kinds: Sequence[LayerKind], plans: Sequence[RowPlan], columns: int) -> dict[LayerKind, Layout]:
    """The layouts of all kinds of layers for one forward of `columns` columns."""
    first = plans[0]
    if first.new == columns and all(plan == first for plan in plans):
        return {kind: UniformLayout(kind, first, columns) for kind in kinds}
    return {kind: RaggedLayout(kind, plans, columns) for kind in kinds}


def visible_columns(layouts: Iterable[Layout], columns: int) -> torch.Tensor:
    """Which of the last `columns` mask coordinates each row sees, [rows, columns], for all kinds of layers at once.

    Each kind reads as many of them as it has, from the right. A sliding window may be offered more than it holds: the
    model's own mask of the window hides the rest.

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
    column, count = torch.arange(columns)[None, :], torch.tensor(filled)[:, None]  # [1, columns], [rows, 1]
    return column >= columns - count
