"""One forward in the making: row plans, layouts, and what the model's forward is to receive."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sink_patch.clock import RowPlan
from sink_patch.layout import LayerKind, Layout, UniformLayout, make_layout
from sink_patch.rotation import CosSin, Rotation


class Step:
    """Lives from the start of a forward to its end; made once, used by all layers.

    Args:
        plans: one for each row of the batch.
        columns: tokens that the forward brings to each row, padding counted in.
        kinds: the kinds of layers of the cache.
        device: where the model wants `position_ids` and `attention_mask`.
    """

    def __init__(self, plans: Sequence[RowPlan], columns: int, kinds: Sequence[LayerKind], device: torch.device):
        self.plans = tuple(plans)
        self.columns = columns
        self.device = device
        self.touched = False  # whether a layer has stored anything
        self.layouts: dict[LayerKind, Layout] = {kind: make_layout(kind, self.plans, columns) for kind in kinds}
        self.sink_turns = tuple(plan.sink_turn for plan in self.plans)
        self._turned: dict[tuple[int, torch.device], CosSin] = {}
        self._offsets = self._mask_offsets()

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
        """2D mask over the columns that the kinds of layers see, one region after the other; None: all visible.

        Args:
            explicit: give a mask of ones instead of None, for models that count its columns.
        """
        regions = [layout.valid for layout in self.layouts.values() if layout.valid is not None]
        if not regions or all(bool(region.all()) for region in regions):
            if not explicit:
                return None
            length = max(layout.length for layout in self.layouts.values())
            return torch.ones(len(self.plans), length, dtype=torch.long, device=self.device)
        return torch.cat(regions, dim=1).to(device=self.device, dtype=torch.long)  # [rows, sum of lengths]

    def first_position(self) -> int:
        """RoPE position of the first new token, in the row that is furthest."""
        return max(plan.first_position for plan in self.plans)

    def past_columns(self) -> int:
        """Visible columns before the new tokens, in the kind of layer that sees most."""
        return max((layout.length for layout in self.layouts.values()), default=self.columns) - self.columns

    def mask_sizes(self, kind: LayerKind) -> tuple[int, int]:
        """(number of visible columns, where they start in the 2D mask) for a layer of this kind."""
        return self.layouts[kind].length, self._offsets[kind]

    def query_offset(self, kind: LayerKind) -> int:
        """Mask coordinate of the first new token: the new ones are the last `columns` of the visible columns."""
        length, offset = self.mask_sizes(kind)
        return offset + length - self.columns

    def sink_turn(self, rotation: Rotation, device: torch.device) -> CosSin:
        """Cosine and sine that take the pristine sinks to where this forward sees them; computed once a step."""
        key = (id(rotation), device)
        if key not in self._turned:
            same = all(turn == self.sink_turns[0] for turn in self.sink_turns)
            turns = self.sink_turns[:1] if same else self.sink_turns
            self._turned[key] = rotation.cos_sin(torch.tensor(turns, dtype=torch.long), device)
        return self._turned[key]

    def _mask_offsets(self) -> dict[LayerKind, int]:
        """Ragged rows need a mask of their own for each kind: its columns stand behind those of the kind before."""
        offsets, offset = {}, 0
        for kind, layout in self.layouts.items():
            offsets[kind] = offset
            if layout.valid is not None:
                offset += layout.length
        return offsets
