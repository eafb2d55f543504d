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

from sink_patch import drafts, graph
from sink_patch.arguments import ARGUMENTS
from sink_patch.cache import SinkCache
from sink_patch.compat import installed_shim
from sink_patch.entries import cache_argument, input_device
from sink_patch.errors import SinkArgumentError, UnsupportedGenerationError
from sink_patch.padding import check_left_padded
from sink_patch.prefill import fed_in_pieces, stream_length
from sink_patch.request import NAME, Request

logger = logging.getLogger("sink_patch")

_MODES = ("greedy_search", "sample", "beam_search", "beam_sample", drafts.MODE)
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
        _check_no_sizes(request, given, asked)
        return generation_config, model_kwargs
    if request.refuses_cache:
        raise SinkArgumentError(
            "A sink cache was asked for together with use_cache=False. Leave out use_cache, or pass "
            "cache_implementation=None and no past_key_values."
        )
    _check_options(generation_config)
    _check_rows(model_kwargs.get("attention_mask"))
    if isinstance(cache, SinkCache):
        _check_own_cache(cache, request)
        # the user's cache takes the place of what the model's own config says
        generation_config.cache_implementation = None
    else:
        _check_no_other_cache(cache)
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
    _check_mode(mode)
    if mode == drafts.MODE:
        drafts.check(instance, generation_config)
        _check_assistant(given)
    _check_rows(model_kwargs.get("attention_mask"))  # transformers makes one from padding tokens where none was given
    if made:
        cache = SinkCache(**generation_config.cache_config, model=instance)
        model_kwargs[cache_argument(instance)] = cache
    else:
        cache.bind(instance)
        _check_embeds(model_kwargs, cache)
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
    _check_assistant(given)
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
    with graph.said_compileable(cache):
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


def _check_no_sizes(request: Request, given: Mapping[str, Any], asked: Any) -> None:
    """Sizes of the sink cache without the sink cache; a config that asks for another one may still hold them."""
    passed = given.get("generation_config")
    said = request.said if passed is None or passed.cache_implementation is None else request.said[:2]
    names = [name for name in ARGUMENTS if any(name in source for source in said)]
    if names:
        raise SinkArgumentError(
            f"{' and '.join(names)} belong to the sink cache, but cache_implementation is {asked!r}. Add "
            f"cache_implementation={NAME!r}, or leave them out."
        )


def _check_options(generation_config: Any) -> None:
    if generation_config.guidance_scale not in (None, 1):
        raise UnsupportedGenerationError(
            f"guidance_scale={generation_config.guidance_scale} was asked for with a sink cache. The text without the "
            "prompt, which guidance compares with, has a cache of transformers' own, that grows without end. Leave it "
            "out, or use another cache."
        )
    if generation_config.return_dict_in_generate and getattr(generation_config, "return_legacy_cache", None):
        raise SinkArgumentError(
            "return_legacy_cache=True was asked for with a sink cache, which cannot be given back as tuples of keys "
            "and values: they would not say which tokens they belong to. Leave it out; past_key_values is a SinkCache."
        )


def _check_own_cache(cache: SinkCache, request: Request) -> None:
    asked = request.implementation
    if asked not in (None, NAME):
        raise SinkArgumentError(
            f"cache_implementation={asked!r} was asked for, together with a SinkCache in past_key_values. Leave one "
            "of them out."
        )
    for name, value in request.sizes_said().items():
        if value != getattr(cache, name):
            raise SinkArgumentError(
                f"{name}={value!r} was given, but the SinkCache in past_key_values has {name}={getattr(cache, name)}. "
                "A cache keeps its sizes: leave the argument out, or pass no cache."
            )


def _check_no_other_cache(cache: Any) -> None:
    if cache is not None:
        raise SinkArgumentError(
            f"cache_implementation={NAME!r} was asked for, together with a {type(cache).__name__} in past_key_values. "
            "Pass a SinkCache, or none, or cache_implementation=None."
        )


def _check_mode(mode: str) -> None:
    if mode not in _MODES:
        raise UnsupportedGenerationError(
            f"The decoding mode {mode!r} was asked for with a sink cache, which it cannot use: it goes back over its "
            f"cache in ways of its own. Use one of {', '.join(_MODES)}, or another cache."
        )


def _check_assistant(given: Mapping[str, Any]) -> None:
    """Versions say who it is in different places."""
    if isinstance(given.get("assistant_model"), nn.Module):
        drafts.check_model(given["assistant_model"])


def _check_rows(attention_mask: Any) -> None:
    if not isinstance(attention_mask, torch.Tensor):
        return
    empty = (attention_mask != 0).sum(dim=-1) == 0  # [rows]
    if bool(empty.any()):
        raise SinkArgumentError(
            f"Row {empty.nonzero()[0].item()} of attention_mask is padding only. Every row needs a token to start from."
        )
    check_left_padded(attention_mask[:, -2:] != 0, to_the_end=True)


def _check_embeds(model_kwargs: Mapping[str, Any], cache: SinkCache) -> None:
    embeds, mask, fed = model_kwargs.get("inputs_embeds"), model_kwargs.get("attention_mask"), cache.get_seq_length()
    if embeds is None or not fed:
        return
    columns = embeds.shape[1]
    if columns <= fed or (mask is not None and columns < mask.shape[-1]):
        raise SinkArgumentError(
            f"inputs_embeds of {columns} columns were given with a SinkCache that has seen {fed}. transformers takes "
            "embeddings for the whole history: pass that, or the new tokens as input_ids."
        )


def _mask_whole_stream(generation_config: Any, model_kwargs: dict[str, Any], cache: SinkCache, model: Any) -> None:
    """Transformers takes ids that are as long as their mask for the whole history; say that these are new ones.

    Ids that are no longer than what the cache has seen cannot be the history.
    """
    fed, length = cache.get_seq_length(), stream_length(generation_config, model_kwargs)
    if fed == 0 or length > fed:
        return
    past, mask = cache.mask_of_past(), model_kwargs.get("attention_mask")  # [rows, fed], [rows, length]
    new = past.new_ones(past.shape[0], length) if mask is None else mask.to(past)
    model_kwargs["attention_mask"] = torch.cat((past, new), dim=1).to(input_device(model))  # [rows, fed + length]
    model_kwargs["position_ids"] = torch.arange(fed + length, device=input_device(model))[None, :]


def _plan_chunks(generation_config: Any, model_kwargs: Mapping[str, Any], cache: SinkCache) -> None:
    """A prompt that would run past the positions that the model was trained on goes in piece by piece."""
    length = stream_length(generation_config, model_kwargs)
    fits = cache.fits_in_one_forward(length - cache.get_seq_length())
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
