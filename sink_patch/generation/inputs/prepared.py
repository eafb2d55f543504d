"""What the wrappers around the methods do that make the inputs of each forward of a call, or tell where they stand."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sink_patch.cache.sink_cache import SinkCache
from sink_patch.models.entries import cache_argument
from sink_patch.streaming.bound import streams_of
from sink_patch.streaming.calls import guard


def prepare_inputs(
    wrapped: Callable[..., Any], instance: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Around that of `GenerationMixin`, which nearly all models come to: the forward that follows is watched."""
    guard.expect_forward(instance)
    return wrapped(*args, **kwargs)


def keep_cache(wrapped: Callable[..., Any], instance: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around those that throw the cache away where the text comes to the end of the original context.

    They do so, and nothing else, as all keys must be made anew there with the frequencies of long texts (longrope; see
    modeling_phi3.py). In a sink cache positions stay within the original context, where the frequencies are those of
    short texts: so it stays, and the method of `GenerationMixin` is called in their place.
    """
    from transformers.generation.utils import GenerationMixin

    given = dict(inspect.signature(wrapped).bind(*args, **kwargs).arguments)
    if not isinstance(given.get(cache_argument(instance)), SinkCache):
        return wrapped(*args, **kwargs)
    others: dict[str, Any] = given.pop("kwargs", {})
    return GenerationMixin.prepare_inputs_for_generation(instance, **given, **others)


def initial_cache_position(
    wrapped: Callable[..., Any], instance: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Around `_get_initial_cache_position`, which takes new tokens alone for a history."""
    given = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    model_kwargs = given["model_kwargs"]
    cache = model_kwargs.get(cache_argument(instance))
    call = streams_of(cache).call if isinstance(cache, SinkCache) else None
    if call is None or call.columns.is_history or given["seq_length"] != call.columns.given:
        return wrapped(*args, **kwargs)
    stream = call.columns.stream
    model_kwargs["cache_position"] = torch.arange(stream - call.columns.given, stream, device=given["device"])
    return model_kwargs
