"""One forward of a single token at fixed shapes and addresses, for a graph that is compiled once.

All that changes from token to token is in tensors, and is changed before the graph runs: where the token is written,
which slots are seen, its position. What the graph reads of Python is the same in each step.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch

from sink_patch.buffers.devices import moved, on_device
from sink_patch.buffers.layers import SinkLayer
from sink_patch.buffers.layouts import Layout
from sink_patch.buffers.store import LayerStore
from sink_patch.rules.kinds import LayerKind
from sink_patch.rules.plans import RowPlan
from sink_patch.rules.rows import Row
from sink_patch.streaming.steps import Step

HAVE_GRAPHS = ("cuda",)  # devices on which torch can replay what it has recorded


class FixedLayout(Layout):
    """Each row writes one slot and reads all of them; a mask hides those that are empty.

    `slots` is int64 [rows].

    Args:
        visible: int64 [rows, length], zeros; in it, 1 for slots that hold a token.
    """

    in_place = True
    brings_sinks = False  # they are in before such a step

    def __init__(self, kind: LayerKind, visible: torch.Tensor):
        self.kind = kind
        self.length = self.reach = kind.capacity
        self.slots = visible.new_zeros(len(visible))
        self.visible = visible
        self._rows = torch.arange(len(visible), device=visible.device)
        self._held: list[int] | None = None  # tokens of each row that `visible` shows; None: not known
        for tensor in (self.slots, self._rows):
            mark_as_staying(tensor)

    def prepare(self, plans: Sequence[RowPlan]) -> None:
        """Say where the next token of each row goes."""
        seen = [self.kind.count(plan) for plan in plans]
        slots = [self.kind.write_runs(plan, columns=1)[0][0] for plan in plans]
        if self._held != seen:
            filled = torch.tensor([min(count, self.length) for count in seen])[:, None]  # [rows, 1]
            self.visible.copy_(moved((torch.arange(self.length)[None, :] < filled).long(), self.visible.device))
        fill(self.slots, slots)
        if min(seen) < self.length:
            self.visible.scatter_(1, self.slots[:, None], 1)
        self._held = [count + 1 for count in seen]

    def write(self, buffer: torch.Tensor, states: torch.Tensor) -> None:
        """Copy states [rows, heads, 1, dim] into buffer [rows, heads, length, dim]."""
        buffer[self._rows, :, self.slots] = states[:, :, 0]  # [rows, heads, dim], which inductor does in place

    def write_sinks(self, pristine: torch.Tensor, states: torch.Tensor) -> None:
        """Nothing: they are in."""

    def read(self, buffer: torch.Tensor, states: torch.Tensor) -> torch.Tensor:  # noqa: ARG002 - read in place
        return buffer


class FixedStep(Step):
    """A step that is used again and again.

    Args:
        store: the layers of the cache, which have all their slots and stay where they are.
        rows, device: of the cache.
        side_by_side: give each kind columns of its own in the mask. Else all read its last columns, each as many as it
            sees, so that where there are several kinds all their slots must be full (`is_ready`).
    """

    @torch.inference_mode(False)  # else what was made in inference mode could not be changed outside it
    def __init__(self, store: LayerStore, rows: int, device: torch.device, *, side_by_side: bool):
        super().__init__((), 1, (), device)
        for layer in store.sink_layers:
            for ring in layer.rings:
                mark_as_staying(ring.buffer)
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

    @staticmethod
    def is_possible(kinds: Sequence[LayerKind]) -> bool:
        """Whether layers of these kinds can ever be read at fixed shapes, and so in any order."""
        return len(kinds) > 0 and not any(kind.ordered for kind in kinds)

    @staticmethod
    def is_ready(kinds: Sequence[LayerKind], rows: Sequence[Row], *, side_by_side: bool) -> bool:
        """Whether they can be now: all sinks of the rows are in, nothing unseen is held."""
        full = len(kinds) > 1 and not side_by_side
        enough = [kind.capacity if full else kind.num_sink_tokens for kind in kinds]
        are_in = all(kind.count(row) >= count for kind, count in zip(kinds, enough, strict=True) for row in rows)
        return are_in and not any(kind.spare for kind in kinds)

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

    A sliding window must not reach back further than from the newest column, and transformers 4.52 cuts the mask of full
    layers from the left.
    """
    return [sum(other.capacity for other in kinds if other.capacity >= kind.capacity) for kind in kinds]


class FixedSteps:
    """Gives the fixed step of a cache, the same one as long as its layers stay where they are.

    Args:
        store: the layers of the cache.
    """

    def __init__(self, store: LayerStore):
        self._store = store
        self._step: FixedStep | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy lies elsewhere, and makes a step of its own."""
        return {**vars(self), "_step": None}

    def can_be_ready(self) -> bool:
        """Whether there is one, or all layers lie on one device, so that one can be made."""
        return self._held() is not None or len(self._store.devices()) == 1

    def prepared(self, plans: Sequence[RowPlan], device: torch.device, *, side_by_side: bool) -> FixedStep:
        """The step, for a forward of these plans."""
        step = self._held()
        if step is None or step.side_by_side != side_by_side:
            self._step = None  # what it holds would be there twice
            self._store.take_all_slots()
            step = self._step = FixedStep(self._store, len(plans), device, side_by_side=side_by_side)
        step.prepare(plans)
        return step

    def _held(self) -> FixedStep | None:
        return self._step if self._step is not None and self._step.is_of(self._store.sink_layers) else None


def mark_as_staying(tensor: torch.Tensor | None) -> None:
    """Tell the compiler that a tensor stays where it is.

    A CUDA graph replays the addresses that it was recorded with, and is given up where it would write to any others.
    Those of another cache are recorded anew, and not compiled anew.
    """
    if tensor is not None and tensor.device.type in HAVE_GRAPHS:
        torch._dynamo.mark_static_address(tensor, guard=False)


def fill(tensor: torch.Tensor, numbers: Sequence[int]) -> None:
    """Set a tensor [rows] or [rows, 1]; one number for all needs no copy from the host."""
    if len(set(numbers)) == 1:
        tensor.fill_(numbers[0])
    else:
        tensor.copy_(on_device(numbers, tensor.device).view_as(tensor))
