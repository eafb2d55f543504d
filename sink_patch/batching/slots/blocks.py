"""The blocks of a slot in all allocators of a paged cache: given out, copied, handed over, given back."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Holder:
    """Stands for a request where transformers asks whose blocks they are.

    Args:
        request_id: by which allocators know them.
        tokens: that lie in them.
    """

    request_id: Hashable
    tokens: int

    def current_len(self) -> int:
        return self.tokens


class Blocks:
    """The blocks of all allocators of a paged cache.

    Args:
        cache: of transformers.
        stream: on which the model runs, so that copies are made in order; None: on the current one.
    """

    def __init__(self, cache: Any, stream: Any):
        self._cache, self._stream = cache, stream

    def has(self, request_id: Hashable) -> bool:
        """Whether there are blocks of that name."""
        return all(request_id in allocator.block_table for allocator in self._allocators)

    def give(self, holder: Any, more: int) -> bool:
        """Whether there is room for so many tokens more; if so, it is given."""
        self._cache.pool.try_to_free_sectors()
        fits: bool = type(self._cache).can_store_request_tokens(self._cache, holder, more)
        return fits

    def hand_over(self, old: Hashable, new: Hashable) -> None:
        for allocator in self._allocators:
            allocator.block_table[new] = allocator.block_table.pop(old)

    def copy(self, source: Hashable, target: Hashable) -> None:
        """Copy what lies in blocks into others; the shorter table says how many."""
        with on_stream(self._stream):
            for allocator in self._allocators:
                pairs = list(zip(allocator.block_table[source], allocator.block_table[target], strict=False))
                allocator.copy_blocks([old for old, _ in pairs], [new for _, new in pairs])

    def free(self, request_id: Hashable) -> None:
        for allocator in self._allocators:
            allocator.free_blocks(request_id)

    @property
    def _allocators(self) -> list[Any]:
        return list(self._cache.cache_allocators.values())


def on_stream(stream: Any) -> contextlib.AbstractContextManager[Any]:
    """Inside, the device is asked on this stream of torch; None: on the one that is current."""
    if stream is None:
        return contextlib.nullcontext()
    asked: contextlib.AbstractContextManager[Any] = torch.get_device_module(stream.device).stream(stream)
    return asked
