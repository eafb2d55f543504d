"""Where the tokens of one forward are read and written in the buffers of one kind of layer.

A buffer is a ring behind a few fixed slots: absolute index i lies in slot `i if i < S else S + (i - S) % (C - S)`, with
C the slots and S the sinks of the layer's kind. Two layouts share one interface: `UniformLayout` (all rows of the batch
have seen equally much: slices only) and `RaggedLayout` (ragged.py: they have not; index tensors and a mask). A third
one, for graphs, is `FixedLayout` (streaming/fixed/).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from sink_patch.buffers.devices import slot_on
from sink_patch.rules.kinds import LayerKind
from sink_patch.rules.plans import RowPlan


class Layout(ABC):
    """What one forward reads and writes in each buffer of the layers of one kind.

    Args:
        kind: of the layers.
        columns: tokens that it brings to each row, padding counted in.
        length: visible columns, [rows, heads, length, dim] is what the layer attends to.
        reach: slots that a buffer must have to be written to.
        in_place: whether what is seen is the buffer itself (its first `length` slots), once it is written to.
        brings_sinks: whether some of the new tokens are sinks.
        all_visible: whether no row needs a mask.
        slot: int64 [1], the one slot that is written in a buffer that has all slots and is seen as it is; None: it is
            not so.
    """

    kind: LayerKind
    columns: int
    length: int
    reach: int
    in_place: bool
    brings_sinks: bool
    all_visible: bool = True
    slot: torch.Tensor | None = None

    @abstractmethod
    def write(self, buffer: torch.Tensor, states: torch.Tensor) -> None:
        """Copy the tokens that stay from states [rows, heads, columns, dim] to buffer [rows, heads, slots, dim]."""

    @abstractmethod
    def write_sinks(self, pristine: torch.Tensor, states: torch.Tensor) -> None:
        """The same for the sinks alone, into a tensor [rows, heads, num_sink_tokens, dim]."""

    @abstractmethod
    def read(self, buffer: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """What is seen, before the new states are written: [rows, heads, length, dim]."""


class UniformLayout(Layout):
    """All rows of the batch have seen equally much and bring no padding.

    Args:
        device: where the layers probably are; None: not known.
    """

    def __init__(self, kind: LayerKind, plan: RowPlan, columns: int, device: torch.device | None = None):
        self.kind, self.columns, count = kind, columns, kind.count(plan)
        if count >= kind.slots and kind.is_the_buffer(columns):  # which has all slots then
            slot = kind.slot(count)
            self._writes, self._reads = [(slot, 0, 1)], []
            self.brings_sinks, self.reach, self.slot = False, kind.slots, slot_on(device, slot)
            self.length, self.in_place = kind.slots, True
            return
        self.length = kind.past(plan) + columns
        self.in_place = kind.is_in_order(plan) or kind.is_the_buffer(columns)
        self._writes = kind.write_runs(plan, columns)
        self._reads = [] if self.in_place else kind.past_runs(plan)
        self.brings_sinks = any(slot < kind.num_sink_tokens for slot, _, _ in self._writes)
        self.reach = max((slot + length for slot, _, length in self._writes), default=0)

    def write(self, buffer: torch.Tensor, states: torch.Tensor) -> None:
        for slot, column, length in self._writes:
            stays = states if length == self.columns else states[:, :, column : column + length]
            buffer[:, :, slot : slot + length] = stays

    def write_sinks(self, pristine: torch.Tensor, states: torch.Tensor) -> None:
        for slot, column, length in self._writes:
            if slot < self.kind.num_sink_tokens:
                pristine[:, :, slot : slot + length] = states[:, :, column : column + length]

    def read(self, buffer: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """The visible past in stream order, then the new tokens: [rows, heads, length, dim]."""
        past = [buffer[:, :, slot : slot + length] for slot, length in self._reads]
        return torch.cat([*past, states], dim=2) if past else states
