"""What an object holds, taken apart into tensors with names and JSON, and put together again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from sink_patch.errors import CacheStateError

_PLAIN = (type(None), bool, int, float, str)
_SEQUENCES = {"list": list, "tuple": tuple}


def pack(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """JSON for a value; the tensors in it go into `tensors`, under names that begin with `name`.

    Raises:
        CacheStateError: it is of a type, or holds something of a type, of which nothing is known.
    """
    if type(value) in _PLAIN:
        return value
    if isinstance(value, torch.Tensor):
        tensors[name] = value
        return {"tensor": name}
    if type(value) is dict:
        return {"dict": [[pack(key, name, tensors), pack(one, f"{name}.{key}", tensors)] for key, one in value.items()]}
    if type(value) in _SEQUENCES.values():
        return {type(value).__name__: [pack(one, f"{name}.{index}", tensors) for index, one in enumerate(value)]}
    if isinstance(value, (torch.dtype, torch.device)):
        return {type(value).__name__: str(value).removeprefix("torch.")}
    raise CacheStateError(
        f"This cache cannot be saved: {name} is a {type(value).__name__}, which sink_patch cannot write to a file. "
        "Keep the cache in memory (clone() copies it)."
    )


def unpack(packed: Any, tensors: dict[str, torch.Tensor], device: torch.device) -> Any:
    """The value again; its tensors are copies on `device`, and so are devices that it names."""
    if not isinstance(packed, dict):
        return packed
    ((what, held),) = packed.items()
    if what == "tensor":
        return tensors[held].to(device=device, copy=True)
    if what == "dict":
        return {key: unpack(one, tensors, device) for key, one in held}
    if what in _SEQUENCES:
        return _SEQUENCES[what](unpack(one, tensors, device) for one in held)
    return device if what == "device" else getattr(torch, held)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """All tensors of a nest of dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(one)
