"""Small tensors that Python has made, on the device where they are needed, without waiting for it."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

_CPU = torch.device("cpu")
_SLOTS = 64  # that are made at once, as tokens go into one slot after the other
Numbers = Sequence[int] | Sequence[Sequence[int]]


def on_device(numbers: Numbers, device: torch.device) -> torch.Tensor:
    """An int64 tensor of these numbers."""
    return moved(torch.tensor(numbers, dtype=torch.long), device)


def slot_on(device: torch.device | None, slot: int) -> torch.Tensor | None:
    """int64 [1], for `index_copy_`; None where that is not known to work (Apple's MPS, and others), or no device is.

    It copies a token in two thirds of the time that a slice takes.
    """
    if device is None:
        return None
    number, place = divmod(slot, _SLOTS)
    made = _slots(device, queue_of(device), number)
    return None if made is None else made[place]


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # else they could not be used outside it
def _slots(device: torch.device, _queue: int, number: int) -> tuple[torch.Tensor, ...] | None:
    if device.type not in ("cpu", "cuda"):
        return None
    first = number * _SLOTS
    return torch.arange(first, first + _SLOTS, device=device)[:, None].unbind()  # int64 [1] each


def queue_of(device: torch.device) -> int:
    """Which stream of a GPU is asked now: what another one was asked to make may not be there yet. 0 elsewhere."""
    if device == _CPU:  # as in a cold cache `type`, which makes a text, takes as long as a copy
        return 0
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on a device.

    A copy to a GPU starts from pinned memory: from any other the host would wait until the GPU has done all that it was
    asked for before.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
