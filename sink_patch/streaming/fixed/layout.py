"""Where the layers of one kind write and read in a forward at fixed shapes and addresses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sink_patch.buffers.devices import moved, on_device
from sink_patch.buffers.layouts import Layout
from sink_patch.rules.kinds import LayerKind
from sink_patch.rules.plans import RowPlan

HAVE_GRAPHS = ("cuda",)  # devices on which torch can replay what it has recorded


class FixedLayout(Layout):
    """Each row writes one slot and reads all of them; a mask hides those that are empty.

    `slots` is int64 [rows].

    Args:
        visible: int64 [rows, length], zeros; in it, 1 for slots that hold a token.
    """

    columns = 1
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
            filled = torch.tensor([min(count, self.length) for count in seen], device="cpu")[:, None]  # [rows, 1]
            number = torch.arange(self.length, device="cpu")[None, :]  # [1, length]
            self.visible.copy_(moved((number < filled).long(), self.visible.device))
        fill(self.slots, slots)
        if min(seen) < self.length:
            self.visible.scatter_(1, self.slots[:, None], 1)
        self._held = [count + 1 for count in seen]

    def write(self, buffer: torch.Tensor, states: torch.Tensor) -> None:
        """Copy states [rows, heads, 1, dim] into buffer [rows, heads, length, dim]."""
        token = states[:, :, 0].to(buffer.dtype)  # [rows, heads, dim]; another one in a later call under autocast
        buffer[self._rows, :, self.slots] = token  # which inductor does in place

    def write_sinks(self, pristine: torch.Tensor, states: torch.Tensor) -> None:
        """Nothing: they are in."""

    def read(self, buffer: torch.Tensor, states: torch.Tensor) -> torch.Tensor:  # noqa: ARG002 - read in place
        return buffer


def mark_as_staying(held: Any) -> None:
    """Tell the compiler that a tensor, or each one in a dict, stays where it is; anything else is passed over.

    A CUDA graph replays the addresses that it was recorded with, and is given up where it would write to any others.
    Those of another cache are recorded anew, and not compiled anew.
    """
    if isinstance(held, dict):
        for one in held.values():
            mark_as_staying(one)
    elif isinstance(held, torch.Tensor) and held.device.type in HAVE_GRAPHS:
        torch._dynamo.mark_static_address(held, guard=False)


def fill(tensor: torch.Tensor, numbers: Sequence[int]) -> None:
    """Set a tensor [rows] or [rows, 1]; one number for all needs no copy from the host."""
    if len(set(numbers)) == 1:
        tensor.fill_(numbers[0])
    else:
        tensor.copy_(on_device(numbers, tensor.device).view_as(tensor))
