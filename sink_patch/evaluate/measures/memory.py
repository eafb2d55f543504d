"""What a cache and a process hold, in bytes."""

from __future__ import annotations

import importlib
from typing import Any

import torch

import sink_patch


def cache_bytes(cache: Any) -> int:
    """Of all tensors of a cache of transformers or ours, each storage once.

    Caches of transformers hold their tensors in lists, or in layers; all that hangs on the cache is looked through.
    """
    if isinstance(cache, sink_patch.SinkCache):
        return int(cache.nbytes)
    storages: dict[int, int] = {}
    seen: set[int] = set()
    left = [cache]
    while left:
        one = left.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            storage = one.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(one, dict):
            left += one.values()
        elif isinstance(one, (list, tuple)):
            left += one
        elif hasattr(one, "__dict__") and type(one).__module__.startswith("transformers."):
            left += vars(one).values()
    return sum(storages.values())


def process_bytes() -> int | None:
    """Resident memory of this process; None where psutil is not installed."""
    try:
        psutil = importlib.import_module("psutil")
    except ImportError:
        return None
    return int(psutil.Process().memory_info().rss)
