"""A forward of one token in each row, used again for the next."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch

from sink_patch.buffers.layers import SinkLayer
from sink_patch.buffers.store import LayerStore
from sink_patch.rules.kinds import LayerKind
from sink_patch.rules.plans import RowPlan
from sink_patch.streaming.fixed.layout import FixedLayout, fill, mark_as_staying
from sink_patch.streaming.steps.step import Step


class FixedStep(Step):
    """A step that is used again and again.

    Args:
        store: the layers of the cache, which have all their slots and stay where they are.
        rows, device: of the cache.
        side_by_side: give each kind columns of its own in the mask. Else all read its last columns, each as many as it
            sees, so that where there are several kinds all their slots must be full.
    """

    @torch.inference_mode(False)  # else what was made in inference mode could not be changed outside it
    def __init__(self, store: LayerStore, rows: int, device: torch.device, *, side_by_side: bool):
        super().__init__((), 1, (), device)
        for layer in store.sink_layers:
            for ring in layer.rings:
                mark_as_staying(ring.buffer)
        for layer in store.layers:
            for held in vars(layer).values():  # states, which transformers has marked where it has made them itself
                mark_as_staying(held)
        self.side_by_side = side_by_side
        self._keys = [None if layer.keys is None else weakref.ref(layer.keys) for layer in store.sink_layers]
        lengths = [kind.capacity for kind in store.kinds]
        columns = sum(lengths) if side_by_side else max(lengths)
        self._past_columns = columns - 1
        self._ends = _ends(store.kinds) if side_by_side else [columns] * len(lengths)
        self._mask = torch.zeros(rows, columns, dtype=torch.long, device=device)
        self._fixed = [
            FixedLayout(kind, self._mask[:, end - kind.capacity : end])
            for kind, end in zip(store.kinds, self._ends, strict=True)
        ]
        self.layouts = self._fixed
        self._positions = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._coordinates = torch.full((1,), self._past_columns, dtype=torch.long, device=device)
        for tensor in (self._mask, self._positions, self._coordinates):
            mark_as_staying(tensor)

    def is_of(self, layers: Sequence[SinkLayer]) -> bool:
        """Whether these layers still lie where they lay when it was made."""
        held = [keys and keys() for keys in self._keys]
        return all(layer.keys is keys for layer, keys in zip(layers, held, strict=True))

    def prepare(self, plans: Sequence[RowPlan]) -> None:
        """Take the plans of the next token."""
        self._take(plans)
        for layout in self._fixed:
            layout.prepare(plans)
        fill(self._positions, [plan.first_position for plan in plans])

    def position_ids(self) -> torch.Tensor:
        """[rows, 1], always at the same address."""
        return self._positions

    def mask_coordinates(self) -> torch.Tensor:
        """[1], always at the same address."""
        return self._coordinates

    def mask_sizes(self, kind_index: int) -> tuple[int, int]:
        """Its columns of the mask."""
        length = self.layouts[kind_index].length
        return length, self._ends[kind_index] - length

    def attention_mask(self, *, explicit: bool = False) -> torch.Tensor:  # noqa: ARG002
        """[rows, columns], always at the same address."""
        return self._mask


def _ends(kinds: Sequence[LayerKind]) -> list[int]:
    """Where the columns of each kind end, side by side: the widest first, then the sliding window.

    A sliding window must not reach back further than from the newest column, and some models cut the mask of full
    layers from the left.
    """
    return [sum(other.capacity for other in kinds if other.capacity >= kind.capacity) for kind in kinds]
