"""What the wrapped methods of `GenerationMixin` do: read the arguments, refuse what cannot be right, make the cache.

Both functions are wrapt wrappers `(wrapped, instance, args, kwargs)`; `instance` is the model.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from sink_patch.arguments import ARGUMENTS
from sink_patch.cache import SinkCache
from sink_patch.errors import SinkArgumentError, UnsupportedGenerationError
from sink_patch.seam import CACHE_NAMES

logger = logging.getLogger("sink_patch")

NAME = "sink"
_MODES = ("greedy_search", "sample", "beam_search", "beam_sample")
_told_about_chunks: set[str] = set()


def prepare_generation_config(
    wrapped: Callable[..., Any], instance: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Around `_prepare_generation_config`: take `window_length` and `num_sink_tokens`, and check all arguments.

    It is the first thing that `generate` does, so a refusal comes before anything is computed.
    """
    given = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    extra = {**given.get("kwargs", {})}
    own = {name: extra.pop(name) for name in ARGUMENTS if name in extra}
    own = {name: value for name, value in own.items() if value is not None}
    kwargs = {name: value for name, value in kwargs.items() if name not in ARGUMENTS}
    generation_config, model_kwargs = wrapped(*args, **kwargs)
    cache = model_kwargs.get(_cache_name(instance))
    wanted = generation_config.cache_implementation == NAME
    if wanted or isinstance(cache, SinkCache):
        _check_rows(model_kwargs.get("attention_mask"))
    if isinstance(cache, SinkCache):
        _check_own_cache(cache, own)
        _check_use_cache(generation_config, extra, given.get("generation_config"), instance)
        cache.bind(instance)
        if wanted:  # the user's cache is what the config asks for
            generation_config.cache_implementation = None
    elif wanted:
        _check_no_other_cache(cache)
        _check_use_cache(generation_config, extra, given.get("generation_config"), instance)
        _check_cache_config(extra.get("cache_config"))
        sources = (own, extra.get("cache_config"), *_config_sources(given.get("generation_config"), instance))
        window = {name: _first(name, sources, default) for name, default in ARGUMENTS.items()}
        SinkCache(**window, model=instance)  # refuses here what cannot be
        generation_config.cache_config = window
    elif own:
        raise SinkArgumentError(
            f"{' and '.join(own)} belong to the sink cache, but cache_implementation is "
            f"{generation_config.cache_implementation!r}. Add cache_implementation={NAME!r}, or leave them out."
        )
    return generation_config, model_kwargs


def prepare_cache(
    wrapped: Callable[..., Any], instance: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Around `_prepare_cache_for_generation`: make the `SinkCache`, unless the user brought one."""
    given = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    generation_config, model_kwargs = given["generation_config"], given["model_kwargs"]
    cache = model_kwargs.get(_cache_name(instance))
    made = generation_config.cache_implementation == NAME
    if not made and not isinstance(cache, SinkCache):
        return wrapped(*args, **kwargs)
    _check_mode(generation_config, given.get("generation_mode"))
    _check_rows(model_kwargs.get("attention_mask"))  # transformers makes one from padding tokens where none was given
    if made:
        cache = SinkCache(**generation_config.cache_config, model=instance)
        model_kwargs[_cache_name(instance)] = cache
    else:
        wrapped(*args, **kwargs)
    _plan_chunks(generation_config, model_kwargs, cache)
    return None


def _cache_name(model: nn.Module) -> str:
    """What the model's forward calls its cache."""
    names = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_NAMES if name in names), CACHE_NAMES[0])


def _config_sources(passed: Any, model: Any) -> list[Mapping[str, Any] | None]:
    """Where a config may hold the two arguments, the strongest first: as entries of its own, or in `cache_config`."""
    sources: list[Mapping[str, Any] | None] = []
    for config in (passed, model.generation_config):
        if config is not None:
            sources += [vars(config), config.cache_config]
    return sources


def _first(name: str, sources: tuple[Mapping[str, Any] | None, ...], default: int) -> Any:
    values = (source.get(name) for source in sources if isinstance(source, Mapping))
    return next((value for value in values if value is not None), default)


def _check_own_cache(cache: SinkCache, own: Mapping[str, Any]) -> None:
    for name, value in own.items():
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


def _check_cache_config(cache_config: Any) -> None:
    if cache_config is None:
        return
    unknown = sorted(set(cache_config) - set(ARGUMENTS)) if isinstance(cache_config, Mapping) else [repr(cache_config)]
    if unknown:
        raise SinkArgumentError(
            f"cache_config holds {', '.join(unknown)}, which the sink cache does not know. It takes a dict with "
            f"{' and '.join(ARGUMENTS)}."
        )


def _check_use_cache(generation_config: Any, extra: Mapping[str, Any], passed: Any, model: Any) -> None:
    """To ask for this cache is to ask for a cache, even of a model whose config has none by default (MPT)."""
    own = model.generation_config
    contradictory = own.use_cache is False and own.cache_implementation == NAME
    if extra.get("use_cache") is False or getattr(passed, "use_cache", None) is False or contradictory:
        raise SinkArgumentError(
            "A sink cache was asked for together with use_cache=False. Leave out use_cache, or pass "
            "cache_implementation=None and no past_key_values."
        )
    generation_config.use_cache = True


def _check_mode(generation_config: Any, mode: Any) -> None:
    name = str(getattr(mode, "value", mode))
    if name not in _MODES:
        raise UnsupportedGenerationError(
            f"The decoding mode {name!r} was asked for with a sink cache, which cannot take back tokens that it has "
            f"already made room for. Use one of {', '.join(_MODES)}, or another cache."
        )
    if getattr(generation_config, "is_assistant", None):
        raise UnsupportedGenerationError(
            "An assistant model was given a sink cache, which cannot take back rejected tokens. Give it another one."
        )


def _check_rows(attention_mask: Any) -> None:
    if attention_mask is None:
        return
    empty = (attention_mask != 0).sum(dim=-1) == 0  # [rows]
    if bool(empty.any()):
        raise SinkArgumentError(
            f"Row {empty.nonzero()[0].item()} of attention_mask is padding only. Every row needs a token to start from."
        )


def _plan_chunks(generation_config: Any, model_kwargs: Mapping[str, Any], cache: SinkCache) -> None:
    """A prompt that would run past the positions that the model was trained on goes in piece by piece."""
    length = _stream_length(generation_config, model_kwargs)
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


def _stream_length(generation_config: Any, model_kwargs: Mapping[str, Any]) -> int:
    """Columns of the stream, the prompt counted in."""
    for name in ("attention_mask", "position_ids"):
        if model_kwargs.get(name) is not None:
            return int(model_kwargs[name].shape[-1])
    return int(getattr(generation_config, "_mask_length", 0) or 0)
