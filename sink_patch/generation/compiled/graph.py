"""Decoding through a graph that is compiled once: the forward is begun before it runs, and ended after.

Calls go through one where that is asked for, and by themselves (`by_itself.py` says when) on the devices where
transformers compiles static caches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from sink_patch.cache.sink_cache import SinkCache
from sink_patch.compat import why_not_traced
from sink_patch.errors import UnsupportedGenerationError
from sink_patch.generation.compiled.by_itself import SwitchToGraph, switch_to_graph
from sink_patch.models.entries import cache_argument
from sink_patch.streaming.bound import streams_of
from sink_patch.streaming.calls.guard import check_given
from sink_patch.streaming.inputs import accepted


def may_compile(model: nn.Module, cache: SinkCache, generation_config: Any, criteria: Callable[[], bool]) -> bool:
    """Whether a call goes through a graph, at once where it asks for that, else by itself.

    Args:
        criteria: what transformers asks of it.

    Raises:
        UnsupportedGenerationError: it asks for a graph, and torch cannot trace the model.
    """
    asked = generation_config.compile_config is not None
    by_itself = None if asked else switch_to_graph(model, cache, generation_config)
    streams_of(cache).switch_to_graph = by_itself
    if not asked and by_itself is None:
        return False
    is_met = _asked_of_compiler(cache, criteria)
    return _check_can_be_traced(is_met) if asked else is_met


def _asked_of_compiler(cache: SinkCache, criteria: Callable[[], bool]) -> bool:
    """Meanwhile the cache says that it can be compiled; elsewhere transformers would make masks of its own for it."""
    streams = streams_of(cache)
    try:
        streams.offered_to_compiler = True
        return criteria()
    finally:
        streams.offered_to_compiler = False


def _check_can_be_traced(asked: bool) -> bool:
    """Whether there is to be a graph, as transformers says, of a model that torch can trace.

    Raises:
        UnsupportedGenerationError: it cannot; "static" would fail in the middle of torch.
    """
    problem = why_not_traced() if asked else None
    if problem is not None:
        raise UnsupportedGenerationError(
            f"compile_config was given with a sink cache, but {problem}. Upgrade torch, or leave out compile_config."
        )
    return asked


def compiled_call(model: Any, make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    """What decodes a token of a call that goes through a graph.

    Args:
        make: makes the graph of transformers (`get_compiled_call`), which is the model itself where it makes none.
    """
    _drop_graph_of_another(model)
    compiled = make()
    return compiled if compiled == model.__call__ else functools.partial(decode, model, compiled)


def _drop_graph_of_another(model: nn.Module) -> None:
    """Make a copy of a model let go of the graph of the model that it was copied from.

    transformers keeps the graph on the model (modeling_utils.py, `get_compiled_call`), and copies of a function are the
    same function: a copy would decode with the weights of the other model.
    """
    graph_of = getattr(vars(model).get("_compiled_call"), "_torchdynamo_orig_callable", None)
    if getattr(graph_of, "__self__", model) is not model:
        del model._compiled_call


def decode(model: nn.Module, compiled: Callable[..., Any], /, *args: Any, **inputs: Any) -> Any:
    """A forward of `model` for which transformers would call `compiled`, which is the graph of it."""
    cache, input_ids = inputs.get(cache_argument(model)), inputs.get("input_ids")
    check_given(model, inputs)
    if args or not isinstance(cache, SinkCache):
        return compiled(*args, **inputs)
    if input_ids is None or input_ids.shape[1] != 1 or not cache.is_bound_to(model):
        return model(**inputs)
    streams = streams_of(cache)
    by_itself: SwitchToGraph | None = streams.switch_to_graph
    if not streams.can_be_fixed_now or not (by_itself is None or by_itself.is_due(input_ids.shape[0])):
        return model(**inputs)

    def forward(replaced: dict[str, Any]) -> Any:
        given = inputs | accepted(model, replaced, inputs)
        if not streams.forward.is_fixed:  # a row may bring nothing, which no graph knows
            return model(**given)
        if by_itself is None:
            return compiled(**given)
        return by_itself.through(model, compiled, input_ids.shape[0], given)

    return streams.run_outside(model, input_ids, inputs.get("attention_mask"), forward)
