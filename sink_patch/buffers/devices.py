"""Small tensors that Python has made, on the device where they are needed, without waiting for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

_CPU = torch.device("cpu")
_SLOTS, _MOST_BLOCKS = 64, 64  # slots that are made at once, as tokens go into one after the other; how often, held
Made = TypeVar("Made")
Place = tuple[torch.device, int, int]  # where something was made (`queue_of`), and its number
Numbers = Sequence[int] | Sequence[Sequence[int]]


def on_device(numbers: Numbers, device: torch.device) -> torch.Tensor:
    """An int64 tensor of these numbers."""
    return moved(torch.tensor(numbers, dtype=torch.long, device="cpu"), device)


def slot_on(device: torch.device | None, slot: int) -> torch.Tensor | None:
    """int64 [1], for `index_copy_`; None where that is not known to work (Apple's MPS, and others), or no device is.

    It copies a token in two thirds of the time that a slice takes.
    """
    if device is None:
        return None
    number, place = divmod(slot, _SLOTS)
    slots = made_once(_blocks, device, number, _slots, _MOST_BLOCKS)
    return slots[place] if slots else None


_blocks: dict[Place, tuple[torch.Tensor, ...]] = {}  # of slots; nothing ever writes to them


def _slots(number: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    if device.type not in ("cpu", "cuda"):
        return ()
    first = number * _SLOTS
    return torch.arange(first, first + _SLOTS, device=device)[:, None].unbind()  # int64 [1] each


def made_once(
    held: dict[Place, Made], device: torch.device, number: int, make: Callable[[int, torch.device], Made], most: int
) -> Made:
    """What `make` makes of a number on a device, from `held` if it is there, where the newest `most` are kept.

    Not kept is what is made where tensors do not last: those of a tracer hold no numbers (FakeTensorMode,
    torch.export), and those of a CUDA graph that is being recorded hold them in its replays alone.
    """
    place = (device, queue_of(device), number)
    found = held.get(place)
    if found is None:
        with torch.inference_mode(False):  # else it could not be used outside it
            found = make(number, device)
        if tensors_last(device):
            held[place] = found
            for old in list(held)[:-most]:
                held.pop(old, None)
    return found


def tensors_last(device: torch.device) -> bool:
    """Whether tensors that are made now may be used later (`made_once` says where not)."""
    made = torch.empty(0, device=device)
    return type(made) is torch.Tensor and not (made.is_cuda and torch.cuda.is_current_stream_capturing())


def queue_of(device: torch.device) -> int:
    """Which stream of a GPU is asked now: what another one was asked to make may not be there yet. 0 elsewhere."""
    if device == _CPU:  # to ask for its `type` is to make a string, which takes as long as a small copy
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
