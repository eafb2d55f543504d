"""One forward of a single token at fixed shapes and addresses, for a graph that is compiled once.

All that changes from token to token is in tensors, and is changed before the graph runs: where the token is written,
which slots are seen, its position. What the graph reads of Python is the same in each step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sink_patch.buffers.fixed import FixedLayout, fill, say_it_stays
from sink_patch.buffers.layers import SinkLayer
from sink_patch.rules.kinds import LayerKind
from sink_patch.rules.plans import RowPlan
from sink_patch.streaming.steps import Step


class FixedStep(Step):
    """A step that is used again and again.

    Args:
        kinds: the kinds of layers of the cache. All read one mask, each its last columns: so where there are several,
            all their slots must be full (`is_ready`).
        rows, device: of the cache.
        layers: those with rings, which have all their slots and stay where they are; by their keys that is known.
    """

    is_fixed = True

    @torch.inference_mode(False)  # else what was made in inference mode could not be changed outside it
    def __init__(self, kinds: Sequence[LayerKind], rows: int, device: torch.device, layers: Sequence[SinkLayer]):
        super().__init__((), 1, (), device)
        for layer in layers:
            for buffer in (ring.buffer for ring in layer.rings):
                say_it_stays(buffer)
        self._buffers = [layer.keys for layer in layers]
        self._layouts = [FixedLayout(kind, rows, device) for kind in kinds]
        self._widest = max(self._layouts, key=lambda layout: layout.length)
        self._positions = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._coordinates = torch.full((1,), self.past_columns(), dtype=torch.long, device=device)
        for tensor in (self._positions, self._coordinates):
            say_it_stays(tensor)

    @staticmethod
    def is_possible(kinds: Sequence[LayerKind]) -> bool:
        """Whether layers of these kinds can ever be read at fixed shapes, and so in any order."""
        return len(kinds) > 0 and not any(kind.ordered for kind in kinds)

    @staticmethod
    def is_ready(kinds: Sequence[LayerKind], seen: Sequence[int]) -> bool:
        """Whether they can be now that the rows have seen so many tokens: all sinks are in, nothing unseen is held."""
        enough = max(kind.num_sink_tokens if len(kinds) == 1 else kind.capacity for kind in kinds)
        return min(seen) >= enough and not any(kind.spare for kind in kinds)

    def knows(self, layers: Sequence[SinkLayer]) -> bool:
        """Whether the cache still lies where it lay."""
        return all(layer.keys is buffer for layer, buffer in zip(layers, self._buffers, strict=True))

    def prepare(self, plans: Sequence[RowPlan]) -> None:
        """Take the plans of the next token."""
        self._take(plans)
        for layout in self._layouts:
            layout.prepare(plans)
        fill(self._positions, [plan.first_position for plan in plans])
        self.touched = True  # by what the graph will do

    def layout_of(self, kind_index: int) -> FixedLayout:  # type: ignore[override]
        return self._layouts[kind_index]

    def position_ids(self) -> torch.Tensor:
        """[rows, 1], always at the same address."""
        return self._positions

    def mask_coordinates(self) -> torch.Tensor:
        """[1], always at the same address."""
        return self._coordinates

    def attention_mask(self, *, explicit: bool = False) -> torch.Tensor:  # noqa: ARG002
        """[rows, length], always at the same address."""
        return self._widest.visible

    def past_columns(self) -> int:
        return self._widest.length - 1

    def mask_sizes(self, kind: LayerKind) -> tuple[int, int]:
        return kind.capacity, self._widest.length - kind.capacity
