"""Where one forward of a single token reads and writes at fixed shapes and addresses, for a graph compiled once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sink_patch.buffers.devices import moved, on_device
from sink_patch.rules.kinds import LayerKind
from sink_patch.rules.plans import RowPlan

HAVE_GRAPHS = ("cuda",)  # devices on which torch can replay what it has recorded


class FixedLayout:
    """Each row writes one slot and reads all of them; a mask hides those that are empty.

    `slots` is int64 [rows], `visible` int64 [rows, length].
    """

    in_place = True
    brings_sinks = False  # they are in before such a step

    def __init__(self, kind: LayerKind, rows: int, device: torch.device):
        self.kind = kind
        self.length = self.reach = kind.capacity
        self.slots = torch.zeros(rows, dtype=torch.long, device=device)
        self.visible = torch.zeros(rows, kind.capacity, dtype=torch.long, device=device)
        self._rows = torch.arange(rows, device=device)
        self._held: list[int] | None = None  # tokens of each row that `visible` shows; None: not known
        for tensor in (self.slots, self.visible, self._rows):
            say_it_stays(tensor)

    def prepare(self, plans: Sequence[RowPlan]) -> None:
        """Say where the next token of each row goes."""
        seen = [plan.seen for plan in plans]
        slots = [self.kind.write_runs(plan, columns=1)[0][0] for plan in plans]
        if self._held != seen:
            filled = torch.tensor([min(count, self.length) for count in seen])[:, None]  # [rows, 1]
            self.visible.copy_(moved((torch.arange(self.length)[None, :] < filled).long(), self.visible.device))
        fill(self.slots, slots)
        if min(seen) < self.length:
            self.visible.scatter_(1, self.slots[:, None], 1)
        self._held = [plan.total for plan in plans]

    def write(self, buffer: torch.Tensor, states: torch.Tensor) -> None:
        """Copy states [rows, heads, 1, dim] into buffer [rows, heads, length, dim]."""
        buffer[self._rows, :, self.slots] = states[:, :, 0]  # [rows, heads, dim], which inductor does in place


def say_it_stays(tensor: torch.Tensor | None) -> None:
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
