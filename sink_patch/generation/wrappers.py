"""What the wrapped methods of `GenerationMixin` do: read the arguments, refuse what cannot be right, make the cache.

The public functions are wrapt wrappers `(wrapped, instance, args, kwargs)`; `instance` is the model.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from sink_patch.arguments import ARGUMENTS
from sink_patch.cache.sink_cache import SinkCache
from sink_patch.compat import installed_shim
from sink_patch.errors import SinkArgumentError, UnsupportedGenerationError
from sink_patch.generation import compiled as graph
from sink_patch.generation import drafts, refusals
from sink_patch.generation.prompt import fed_in_pieces, stream_length
from sink_patch.generation.request import NAME, Request
from sink_patch.models.entries import cache_argument, input_device
from sink_patch.streaming.streams import streams_of

logger = logging.getLogger("sink_patch")

_told_about_chunks: set[str] = set()


def prepare_generation_config(
    wrapped: Callable[..., Any], instance: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Around `_prepare_generation_config`: take `window_length` and `num_sink_tokens`, and check all arguments.

    It is the first thing that `generate` does, so a refusal comes before anything is computed.
    """
    bound = inspect.signature(wrapped).bind(*args, **kwargs)
    given, asked_for = bound.arguments, bound.arguments.setdefault("kwargs", {})
    own = drafts.assistants_config(given.get("generation_config"), asked_for)
    if own is not None:
        given["generation_config"] = own
    request = Request.read(asked_for, given.get("generation_config"), instance.generation_config)
    given["kwargs"] = {name: value for name, value in asked_for.items() if name not in ARGUMENTS}
    if request.leaves_sink:
        given["kwargs"]["cache_config"] = None  # which 4.52 and 4.53 would give to the other cache, and refuse
    generation_config, model_kwargs = wrapped(*bound.args, **bound.kwargs)
    cache = model_kwargs.get(cache_argument(instance))
    asked = generation_config.cache_implementation
    if asked != NAME and not isinstance(cache, SinkCache):
        refusals.check_no_sizes(request, given, asked)
        return generation_config, model_kwargs
    if request.refuses_cache:
        raise SinkArgumentError(
            "A sink cache was asked for together with use_cache=False. Leave out use_cache, or pass "
            "cache_implementation=None and no past_key_values."
        )
    refusals.check_options(generation_config)
    refusals.check_rows(model_kwargs.get("attention_mask"))
    if isinstance(cache, SinkCache):
        refusals.check_own_cache(cache, request)
        # the user's cache takes the place of what the model's own config says
        generation_config.cache_implementation = None
    else:
        refusals.check_no_other_cache(cache)
        generation_config.cache_config = request.sizes()
        cache = SinkCache(**generation_config.cache_config)
    cache.check(instance)
    generation_config.use_cache = True  # also of a model whose config has none by default (MPT)
    return generation_config, model_kwargs


def prepare_cache(
    wrapped: Callable[..., Any], instance: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Around `_prepare_cache_for_generation`: make the `SinkCache`, unless the user brought one."""
    given = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    generation_config, model_kwargs = given["generation_config"], given["model_kwargs"]
    cache = model_kwargs.get(cache_argument(instance))
    made = generation_config.cache_implementation == NAME
    if not made and not isinstance(cache, SinkCache):
        return wrapped(*args, **kwargs)
    mode = installed_shim().generation_mode(given)
    refusals.check_mode(mode)
    if mode == drafts.MODE:
        drafts.check(instance, generation_config)
        refusals.check_assistant(given)
    # transformers has made one from padding tokens where none was given
    refusals.check_rows(model_kwargs.get("attention_mask"))
    if made:
        cache = SinkCache(**generation_config.cache_config, model=instance)
        model_kwargs[cache_argument(instance)] = cache
    else:
        cache.bind(instance)
        refusals.check_embeds(model_kwargs, cache)
        wrapped(*args, **kwargs)
        _mask_whole_stream(generation_config, model_kwargs, cache, instance)
    drafts.prepare(generation_config, cache, mode)
    _plan_chunks(generation_config, model_kwargs, cache)
    return None


def decode(wrapped: Callable[..., Any], instance: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around `_sample` and `_beam_search`: a prompt that is to go in by pieces does so first."""
    given = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    generation_config, model_kwargs = given["generation_config"], given.get("model_kwargs", {})
    cache = model_kwargs.get(cache_argument(instance))
    if not isinstance(cache, SinkCache):
        return wrapped(*args, **kwargs)
    with fed_in_pieces(instance, cache, given["input_ids"], generation_config, model_kwargs):
        return wrapped(*args, **kwargs)


def decode_with_drafts(
    wrapped: Callable[..., Any], instance: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Around `_assisted_decoding`: all of the prompt but its last token goes in first, and is never taken back."""
    given = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    generation_config, model_kwargs = given["generation_config"], given.get("model_kwargs", {})
    cache, input_ids = model_kwargs.get(cache_argument(instance)), given["input_ids"]
    if not isinstance(cache, SinkCache):
        return wrapped(*args, **kwargs)
    refusals.check_assistant(given)
    drafts.check_inputs(input_ids.shape[1], stream_length(generation_config, model_kwargs) or input_ids.shape[1])
    with (
        fed_in_pieces(instance, cache, input_ids, generation_config, model_kwargs, drafting=True),
        drafts.recorded(cache),
    ):
        return wrapped(*args, **kwargs)


def may_compile(wrapped: Callable[..., Any], instance: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around `_valid_auto_compile_criteria`: a sink cache is compiled where that is asked for, never by itself."""
    given = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    cache = given["model_kwargs"].get(cache_argument(instance))
    if not isinstance(cache, SinkCache) or given["generation_config"].compile_config is None:
        return wrapped(*args, **kwargs)
    with graph.offered_to_compiler(cache):
        return wrapped(*args, **kwargs)


def compiled_call(
    wrapped: Callable[..., Any], instance: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Around `get_compiled_call`: what it returns begins the step of a sink cache first."""
    return functools.partial(graph.decode, instance, wrapped(*args, **kwargs))


def initial_cache_position(
    wrapped: Callable[..., Any], instance: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Around `_get_initial_cache_position` (up to 5.3), which takes new tokens alone for a history."""
    given = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    model_kwargs, columns = given["model_kwargs"], given["seq_length"]
    mask = model_kwargs.get("attention_mask")
    if not isinstance(model_kwargs.get(cache_argument(instance)), SinkCache) or mask is None or columns == 0:
        return wrapped(*args, **kwargs)
    if columns < mask.shape[-1]:
        model_kwargs["cache_position"] = torch.arange(mask.shape[-1] - columns, mask.shape[-1], device=given["device"])
        return model_kwargs
    return wrapped(*args, **kwargs)


def refuse_continuous_batching(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Around `init_continuous_batching`, which has a paged cache of its own and would pass ours over in silence."""
    config = inspect.signature(wrapped).bind(*args, **kwargs).arguments.get("generation_config")
    config = instance.generation_config if config is None else config
    if getattr(config, "cache_implementation", None) == NAME:
        raise UnsupportedGenerationError(
            f"Continuous batching was asked for with cache_implementation={NAME!r}, but it has a paged cache of its "
            "own. Use generate (or serve without --continuous-batching), or cache_implementation=None."
        )
    return wrapped(*args, **kwargs)


def _mask_whole_stream(generation_config: Any, model_kwargs: dict[str, Any], cache: SinkCache, model: Any) -> None:
    """Transformers takes ids that are as long as their mask for the whole history; say that these are new ones.

    Ids that are no longer than what the cache has seen cannot be the history.
    """
    fed, length = cache.get_seq_length(), stream_length(generation_config, model_kwargs)
    if fed == 0 or length > fed:
        return
    past, mask = streams_of(cache).mask_of_past(), model_kwargs.get("attention_mask")  # [rows, fed], [rows, length]
    new = past.new_ones(past.shape[0], length) if mask is None else mask.to(past)
    model_kwargs["attention_mask"] = torch.cat((past, new), dim=1).to(input_device(model))  # [rows, fed + length]
    model_kwargs["position_ids"] = torch.arange(fed + length, device=input_device(model))[None, :]


def _plan_chunks(generation_config: Any, model_kwargs: Mapping[str, Any], cache: SinkCache) -> None:
    """A prompt that would run past the positions that the model was trained on goes in piece by piece."""
    length = stream_length(generation_config, model_kwargs)
    streams = streams_of(cache)
    fits = streams.planner.fits_in_one_forward(streams.rows or (), length - cache.get_seq_length())
    if generation_config.prefill_chunk_size is not None or fits:
        return
    generation_config.prefill_chunk_size = cache.window_length - cache.num_sink_tokens
    if "chunks" not in _told_about_chunks:
        _told_about_chunks.add("chunks")
        logger.info(
            "A prompt of %d tokens is longer than the model's context: it goes into the sink cache in pieces of %d.",
            length,
            generation_config.prefill_chunk_size,
        )
