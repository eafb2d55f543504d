"""The call of `generate` that is in progress in this thread: its forwards must be given its cache, and no other.

A model may leave the cache out where it makes the inputs of a forward, or put another one in its place, and the text
would go on without the sinks, in silence. The cache cannot tell, as it is not there; so the call is remembered here.

A call over `cache` makes forwards like this:

    prepare_inputs_for_generation   expect_forward: the next forward of this model is the call's own
    forward                         check_given: it has `cache`, and no forward is expected any more
    logits processors, criteria     may run the model for themselves, with whatever cache they like
    prepare_inputs_for_generation   ...

A model may make its inputs without transformers' own `prepare_inputs_for_generation`, which alone tells us. Then each
forward within the call counts as the call's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from sink_patch.errors import UnsupportedGenerationError
from sink_patch.models.entries import CACHE_NAMES
from sink_patch.streaming.bound import StreamingCache

_Result = TypeVar("_Result")


@dataclass(eq=False)
class _CallInProgress:
    """A call of `generate` over a cache.

    Args:
        cache: bound to the model of the call.
        expects: whether the next forward is the call's own; None: nothing has told so far.
    """

    cache: StreamingCache
    expects: bool | None = None


_in_progress: ContextVar[_CallInProgress | None] = ContextVar("call_in_progress", default=None)


def guarded(cache: StreamingCache | None, run: Callable[[], _Result]) -> _Result:
    """Run a call of `generate` over this cache; None: over another one, which is not watched.

    In the end nothing is left of it, also after Ctrl-C, which could fall on the beginning of a context manager's exit.
    """
    outer = _in_progress.get()
    try:
        _in_progress.set(None if cache is None else _CallInProgress(cache))
        return run()
    finally:
        if cache is not None and cache._streams is not None:
            cache._streams.call = None
        _in_progress.set(outer)


def expect_forward(model: nn.Module) -> None:
    """The inputs of a forward of this model are being made for the call in progress."""
    call = _in_progress.get()
    if call is not None and call.cache.is_bound_to(model):
        call.expects = True


def check_given(module: nn.Module, named: Mapping[str, Any]) -> None:
    """A forward of `module` is about to begin with these arguments, a cache among them or none.

    Raises:
        UnsupportedGenerationError: the call in progress has another one, and the forward is its own.
    """
    call = _in_progress.get()
    if call is None or not call.cache.is_bound_to(module):
        return
    caches = [named.get(name) for name in CACHE_NAMES]
    if any(cache is call.cache for cache in caches):
        call.expects = None if call.expects is None else False
    elif call.expects is not False:
        other = next((type(cache).__name__ for cache in caches if cache is not None), None)
        raise UnsupportedGenerationError(
            f"A call of generate with {call.cache!r} was about to run {type(module).__name__} "
            f"{'without a cache' if other is None else f'with a {other} instead'}, so that the text would go on "
            "without its sinks: what makes the inputs of each forward (prepare_inputs_for_generation, mostly) leaves "
            "the cache out. Pass it on there, or use another cache_implementation."
        )
