"""One forward in the making: what it sees, where its tokens go, and what the model's forward is to receive."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sink_patch.buffers.devices import moved, on_device
from sink_patch.buffers.layouts import Layout, UniformLayout
from sink_patch.buffers.ragged import RaggedLayout, visible_columns
from sink_patch.buffers.rotation import Turn
from sink_patch.rules.kinds import LayerKind
from sink_patch.rules.plans import RowPlan


class Step:
    """Lives from the start of a forward to its end; made once, used by all layers.

    `layouts` say where the layers of each kind read and write, in the order of `kinds`; `sink_turn` how far the sinks
    are turned for this forward.

    Args:
        plans: one for each row of the batch.
        columns: tokens that the forward brings to each row, padding counted in.
        kinds: the kinds of layers of the cache.
        device: where the model wants `position_ids` and `attention_mask`.
    """

    def __init__(self, plans: Sequence[RowPlan], columns: int, kinds: Sequence[LayerKind], device: torch.device):
        self.columns = columns
        self.device = device
        self._take(plans)
        self.layouts: Sequence[Layout] = self._made_layouts(kinds) if kinds else ()
        self._past_columns = max((layout.length for layout in self.layouts), default=columns) - columns

    def _made_layouts(self, kinds: Sequence[LayerKind]) -> list[Layout]:
        """The layouts; what is stored while gradients are computed must be detached first, in `Ring.update`."""
        return make_layouts(kinds, self.plans, self.columns, None if torch.is_grad_enabled() else self.device)

    def _take(self, plans: Sequence[RowPlan]) -> None:
        self.plans = tuple(plans)
        self.sink_turn = Turn([plan.sink_turn for plan in self.plans])  # to where this forward sees them

    def position_ids(self) -> torch.Tensor:
        """RoPE positions: [1, columns] where all rows have seen equally much, else [rows, columns], 0 for padding."""
        if all(isinstance(layout, UniformLayout) for layout in self.layouts):
            first_position = self.plans[0].first_position
            if self.columns == 1:  # one operation in place of two
                return torch.full((1, 1), first_position, device=self.device)
            return torch.arange(first_position, first_position + self.columns, device=self.device)[None, :]
        columns = torch.arange(self.columns, device=self.device)
        first = [plan.first_position - (self.columns - plan.new) for plan in self.plans]
        padding = on_device([self.columns - plan.new for plan in self.plans], self.device)
        position_ids = on_device(first, self.device)[:, None] + columns[None, :]  # [rows, columns]
        return position_ids.masked_fill(columns[None, :] < padding[:, None], 0)

    def attention_mask(self, *, explicit: bool = False) -> torch.Tensor | None:
        """2D mask [rows, visible columns] that all kinds of layers read from the right; None: all visible.

        Args:
            explicit: give a mask of ones instead of None, for models that count its columns.
        """
        columns = self.past_columns() + self.columns
        if all(layout.all_visible for layout in self.layouts):
            if not explicit:
                return None
            return torch.ones(len(self.plans), columns, dtype=torch.long, device=self.device)
        return moved(visible_columns(self.layouts, columns).long(), self.device)  # [rows, visible columns]

    def past_columns(self) -> int:
        """Mask coordinate of the first new token: visible columns before it, in the kind of layer that sees most."""
        return self._past_columns

    def mask_coordinates(self) -> torch.Tensor:
        """Mask coordinates of the new tokens, [columns]: what models that take `cache_position` are given."""
        past = self.past_columns()
        return torch.arange(past, past + self.columns, device=self.device)

    def mask_sizes(self, kind_index: int) -> tuple[int, int]:
        """(visible columns, mask coordinate of the first of them) for layers of a kind: the last ones of all."""
        length = self.layouts[kind_index].length
        return length, self.past_columns() + self.columns - length


def make_layouts(
    kinds: Sequence[LayerKind], plans: Sequence[RowPlan], columns: int, device: torch.device | None = None
) -> list[Layout]:
    """The layouts of one forward of `columns` columns, in the order of `kinds`."""
    first = plans[0]
    if first.new == columns and all(plan is first or plan == first for plan in plans):
        return [UniformLayout(kind, first, columns, device) for kind in kinds]
    return [RaggedLayout(kind, plans, columns) for kind in kinds]
