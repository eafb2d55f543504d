"""Decoding through a graph that is compiled once: the step is begun before it runs, and ended after."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from sink_patch.cache.sink_cache import SinkCache
from sink_patch.models.entries import cache_argument
from sink_patch.streaming import hooks as seam


@contextlib.contextmanager
def said_compileable(cache: SinkCache) -> Iterator[None]:
    """Inside, the cache says that it can be compiled; elsewhere transformers would make masks of its own for it."""
    cache.says_compileable = True
    try:
        yield
    finally:
        cache.says_compileable = False


def decode(model: nn.Module, compiled: Callable[..., Any], /, *args: Any, **inputs: Any) -> Any:
    """A forward of `model` for which transformers would call `compiled`, which is the graph of it."""
    cache, input_ids = inputs.get(cache_argument(model)), inputs.get("input_ids")
    if args or not isinstance(cache, SinkCache):
        return compiled(*args, **inputs)
    if input_ids is None or input_ids.shape[1] != 1 or not cache.can_be_fixed_now:
        return model(**inputs)
    replaced = cache.begin_forward(model, input_ids, inputs.get("attention_mask"), fixed=True)
    forward = compiled if cache.is_compileable else model  # a row may bring nothing, which no graph knows
    completed, cache.begun_ahead = False, True
    try:
        output = forward(**inputs | seam.accepted(model, replaced or {}))
        completed = True
    finally:
        cache.begun_ahead = False
        cache.end_forward(model, completed=completed)
    return output
