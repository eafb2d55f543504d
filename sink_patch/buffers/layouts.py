"""Where the tokens of one forward are read and written in the buffers of one kind of layer.

A buffer is a ring behind a few fixed slots: absolute index i lies in slot `i if i < S else S + (i - S) % (C - S)`, with
C the slots and S the sinks of the layer's kind. Two layouts share one interface: `UniformLayout` (all rows of the
batch are in step: slices only) and `RaggedLayout` (they are not: index tensors and a mask).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from sink_patch.buffers.ragged import RaggedLayout
from sink_patch.errors import CacheStateError
from sink_patch.rules.kinds import LayerKind
from sink_patch.rules.plans import RowPlan


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
