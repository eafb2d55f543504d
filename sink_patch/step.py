"""One forward in the making: row plans, layouts, and what the model's forward is to receive."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sink_patch.clock import RowPlan
from sink_patch.layout import LayerKind, Layout, UniformLayout, make_layouts, visible_columns
from sink_patch.rotation import CosSin, Rotation


class Step:
    """Lives from the start of a forward to its end; made once, used by all layers.

    Args:
        plans: one for each row of the batch.
        columns: tokens that the forward brings to each row, padding counted in.
        kinds: the kinds of layers of the cache.
        device: where the model wants `position_ids` and `attention_mask`.
    """

    is_fixed = False  # whether its shapes and addresses are those of the step before

    def __init__(self, plans: Sequence[RowPlan], columns: int, kinds: Sequence[LayerKind], device: torch.device):
        self.columns = columns
        self.device = device
        self.touched = False  # whether a layer has stored anything
        self._take(plans)
        self.layouts: dict[LayerKind, Layout] = make_layouts(kinds, self.plans, columns) if kinds else {}
        lengths = [layout.length for layout in self.layouts.values()]
        self._past_columns = max(lengths, default=columns) - columns

    def _take(self, plans: Sequence[RowPlan]) -> None:
        self.plans = tuple(plans)
        self.sink_turns = tuple(plan.sink_turn for plan in self.plans)
        self._turned: dict[tuple[int, torch.device], CosSin] = {}

    def layout_of(self, kind: LayerKind) -> Layout:
        """Where a kind of layer reads and writes."""
        return self.layouts[kind]

    def position_ids(self) -> torch.Tensor:
        """RoPE positions: [1, columns] where all rows are in step, else [rows, columns] with 0 for padding."""
        columns = torch.arange(self.columns, device=self.device)
        if all(isinstance(layout, UniformLayout) for layout in self.layouts.values()):
            return (columns + self.plans[0].first_position)[None, :]
        first = [plan.first_position - (self.columns - plan.new) for plan in self.plans]
        padding = torch.tensor([self.columns - plan.new for plan in self.plans], device=self.device)
        position_ids = torch.tensor(first, device=self.device)[:, None] + columns[None, :]  # [rows, columns]
        return position_ids.masked_fill(columns[None, :] < padding[:, None], 0)

    def attention_mask(self, *, explicit: bool = False) -> torch.Tensor | None:
        """2D mask [rows, visible columns] that all kinds of layers read from the right; None: all visible.

        Args:
            explicit: give a mask of ones instead of None, for models that count its columns.
        """
        columns = self.past_columns() + self.columns
        if all(layout.all_visible for layout in self.layouts.values()):
            if not explicit:
                return None
            return torch.ones(len(self.plans), columns, dtype=torch.long, device=self.device)
        visible = visible_columns(self.layouts.values(), columns)
        return visible.to(device=self.device, dtype=torch.long)  # [rows, visible columns]

    def past_columns(self) -> int:
        """Mask coordinate of the first new token: visible columns before it, in the kind of layer that sees most."""
        return self._past_columns

    def mask_coordinates(self) -> torch.Tensor:
        """Of the new tokens, [columns]: `cache_position` of transformers up to 5.3."""
        return torch.arange(self.columns, device=self.device) + self.past_columns()

    def mask_sizes(self, kind: LayerKind) -> tuple[int, int]:
        """(visible columns, mask coordinate of the first of them) for a layer of this kind: the last ones of all."""
        length = self.layouts[kind].length
        return length, self.past_columns() + self.columns - length

    def sink_turn(self, rotation: Rotation, device: torch.device) -> CosSin:
        """Cosine and sine that take the pristine sinks to where this forward sees them; computed once a step."""
        key = (id(rotation), device)
        if key not in self._turned:
            same = all(turn == self.sink_turns[0] for turn in self.sink_turns)
            turns = self.sink_turns[0] if same else torch.tensor(self.sink_turns, dtype=torch.long)
            self._turned[key] = rotation.cos_sin(turns, device)
        return self._turned[key]
