"""Decoding through a graph that is compiled once: the forward is begun before it runs, and ended after."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from sink_patch.cache.sink_cache import SinkCache
from sink_patch.compat import why_not_traced
from sink_patch.errors import UnsupportedGenerationError
from sink_patch.models.entries import cache_argument
from sink_patch.streaming.calls.guard import check_given
from sink_patch.streaming.inputs import accepted
from sink_patch.streaming.streams import streams_of


@contextlib.contextmanager
def offered_to_compiler(cache: SinkCache) -> Iterator[None]:
    """Inside, the cache says that it can be compiled; elsewhere transformers would make masks of its own for it."""
    streams = streams_of(cache)
    streams.offered_to_compiler = True
    try:
        yield
    finally:
        streams.offered_to_compiler = False


def check_can_be_traced(asked: bool) -> bool:
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


def drop_graph_of_another(model: nn.Module) -> None:
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
