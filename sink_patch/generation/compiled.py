"""Decoding through a graph that is compiled once: the forward is begun before it runs, and ended after.

With `compile_config` all single tokens of a call go through the graph. Where nobody has asked for that, long calls do
so by themselves on the devices where transformers compiles static caches (`ByItself`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import threading
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from sink_patch.cache.sink_cache import SinkCache
from sink_patch.models.entries import cache_argument
from sink_patch.models.probe.calls import is_compiled
from sink_patch.streaming.calls.guard import check_given
from sink_patch.streaming.inputs import accepted
from sink_patch.streaming.streams import streams_of

LONG = 1024  # new tokens; to compile takes as long as to decode some thousand
PLAIN = 64  # tokens of such a call before it goes over, as many end early

_Sizes = tuple[int, int, int]  # rows, window_length, num_sink_tokens
_graphs: WeakKeyDictionary[nn.Module, set[_Sizes]] = WeakKeyDictionary()  # for what a model has its graph by now


@contextlib.contextmanager
def offered_to_compiler(cache: SinkCache) -> Iterator[None]:
    """Inside, the cache says that it can be compiled; elsewhere transformers would make masks of its own for it."""
    streams = streams_of(cache)
    streams.offered_to_compiler = True
    try:
        yield
    finally:
        streams.offered_to_compiler = False


def decode(model: nn.Module, compiled: Callable[..., Any], /, *args: Any, **inputs: Any) -> Any:
    """A forward of `model` for which transformers would call `compiled`, which is the graph of it."""
    cache, input_ids = inputs.get(cache_argument(model)), inputs.get("input_ids")
    check_given(model, [cache])
    if args or not isinstance(cache, SinkCache):
        return compiled(*args, **inputs)
    if input_ids is None or input_ids.shape[1] != 1 or not cache.is_bound_to(model):
        return model(**inputs)
    streams = streams_of(cache)
    if not streams.can_be_fixed_now:
        return model(**inputs)
    with streams.begun_outside(model, input_ids, inputs.get("attention_mask")) as replaced:
        forward = compiled if streams.forward.is_fixed else model  # a row may bring nothing, which no graph knows
        return forward(**inputs | accepted(model, replaced, inputs))


def by_itself(model: nn.Module, cache: SinkCache, max_length: int) -> bool:
    """Whether a call may be compiled that does not ask for it, and does not forbid it either.

    Not in other threads than the main one, where older versions of torch cannot replay CUDA graphs; not what the user
    has compiled; not what several processes share, where each of them would have to have its graph; and not on a GPU
    without Triton, which torch needs to compile for one: what nobody has asked for must not fail.

    Args:
        model: of the call.
        cache: of the call, which has not read the prompt yet.
        max_length: columns at which the call ends.
    """
    if threading.current_thread() is not threading.main_thread():
        return False
    if is_compiled(model) or are_several_processes() or not can_compile_for(model):
        return False
    call = streams_of(cache).call  # text without end has none
    return bool(_graphs.get(model)) or max_length - (call.columns.given if call else 0) >= LONG


def through(model: nn.Module, compiled: Callable[..., Any], *, asked: bool) -> Callable[..., Any]:
    """What decodes a token through the graph: at once where that was asked for, else where it pays."""
    return functools.partial(decode, model, compiled) if asked else ByItself(model, compiled)


def are_several_processes() -> bool:
    """Whether this process is one of several that share models."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def can_compile_for(model: Any) -> bool:
    """Whether torch has what it needs to compile for the device of the model."""
    return model.device.type not in ("cuda", "xpu") or importlib.util.find_spec("triton") is not None


class ByItself:
    """The forwards of a call that nobody has asked to compile: plain at first, and through the graph where that pays.

    Args:
        model: of the call.
        compiled: the graph of it, which is made when it is first called.
    """

    def __init__(self, model: nn.Module, compiled: Callable[..., Any]):
        self._model, self._compiled = model, compiled
        self._plain = 0  # forwards so far

    def __call__(self, /, *args: Any, **inputs: Any) -> Any:
        """The forward; its output."""
        cache, input_ids = inputs.get(cache_argument(self._model)), inputs.get("input_ids")
        if not isinstance(cache, SinkCache) or input_ids is None:
            return decode(self._model, self._compiled, *args, **inputs)
        sizes = (input_ids.shape[0], cache.window_length, cache.num_sink_tokens)
        known = _graphs.setdefault(self._model, set())
        if self._plain < PLAIN and sizes not in known:
            self._plain += 1
            return self._model(*args, **inputs)
        output = decode(self._model, self._compiled, *args, **inputs)
        known.add(sizes)
        return output
