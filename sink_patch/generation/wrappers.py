"""What the wrapped methods of `GenerationMixin` do: read the arguments, refuse what cannot be right, make the cache.

The public functions are wrapt wrappers `(wrapped, instance, args, kwargs)`; `instance` is the model. In the order of a
call: `prepare_generation_config` (all that is refused by the arguments alone), `prepare_cache` (the model is examined,
once), `decode` or `decode_with_drafts` (the prompt goes in).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from torch import nn

from sink_patch.arguments import CACHE_IMPLEMENTATION, CUSTOM_GENERATE, Settings
from sink_patch.cache.binding import bind, check_holds_nothing
from sink_patch.cache.sink_cache import SinkCache
from sink_patch.compat import installed_shim
from sink_patch.compat.shim import Role
from sink_patch.generation import drafts, refusals
from sink_patch.generation.compiled import graph
from sink_patch.generation.endless.loop import Loop
from sink_patch.generation.inputs import positions, system
from sink_patch.generation.inputs.kept import callers_cache, leave_out_and_check
from sink_patch.generation.inputs.prepared import initial_cache_position, keep_cache, prepare_inputs
from sink_patch.generation.prompt import Prompt
from sink_patch.generation.request import Request
from sink_patch.kept.calls import KeptCall, note
from sink_patch.models.claims import read_claim
from sink_patch.models.entries import cache_argument, unwrapped
from sink_patch.models.examine import examine
from sink_patch.streaming.calls.guard import guarded

Wrapped = Callable[..., Any]


def prepare_generation_config(
    wrapped: Wrapped, instance: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Around `_prepare_generation_config`: take the settings of the cache, and check all arguments.

    It is the first thing that `generate` does, so that no model, encoders of images among them, has run before.
    """
    bound = inspect.signature(wrapped).bind(*args, **kwargs)
    given, asked_for = bound.arguments, bound.arguments.setdefault("kwargs", {})
    if asked_for.get("custom_generate") == CUSTOM_GENERATE:  # of a pipeline that is made; `generate` keeps it to itself
        asked_for.setdefault("cache_implementation", CACHE_IMPLEMENTATION)
    of_assistant = drafts.assistants_config(given.get("generation_config"), asked_for)
    if of_assistant is not None:
        given["generation_config"] = of_assistant
    passed, own = given.get("generation_config"), instance.generation_config
    request = Request.read(asked_for, passed, own)
    given["kwargs"] = {name: value for name, value in asked_for.items() if name not in Settings.names()}
    if request.leaves_sink:
        given["kwargs"]["cache_config"] = None
    generation_config, model_kwargs = wrapped(*bound.args, **bound.kwargs)
    if instance.generation_config is not own:  # some versions make it anew, from the model's config
        request = Request.read(asked_for, passed, instance.generation_config)
    cache = callers_cache(instance, generation_config, model_kwargs)
    if generation_config.cache_implementation != CACHE_IMPLEMENTATION and not isinstance(cache, SinkCache):
        refusals.check_no_sizes(request, generation_config.cache_implementation)
        return generation_config, model_kwargs
    positions.note_positions(generation_config, model_kwargs)
    leave_out_and_check(instance, request, generation_config, model_kwargs)
    if isinstance(cache, SinkCache):
        refusals.check_own_cache(cache, request, model_kwargs)
        check_holds_nothing(cache, unwrapped(instance))
        # the user's cache takes the place of what the model's own config says
        generation_config.cache_implementation = None
    else:
        refusals.check_no_other_cache(cache)
        system.check_settings(instance, settings := request.settings(), generation_config, model_kwargs)
        generation_config.cache_config = settings.as_dict()
    generation_config.use_cache = True  # also of a model whose config has none by default (MPT)
    return generation_config, model_kwargs


def prepare_cache(wrapped: Wrapped, instance: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around `_prepare_cache_for_generation`: make the `SinkCache`, unless the user brought one, and bind it."""
    given = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    generation_config, model_kwargs = given["generation_config"], given["model_kwargs"]
    cache = model_kwargs.get(cache_argument(instance))
    is_made_here = generation_config.cache_implementation == CACHE_IMPLEMENTATION
    if not is_made_here and not isinstance(cache, SinkCache):
        return wrapped(*args, **kwargs)
    mode = installed_shim().generation_mode(given)
    refusals.check_mode(mode)
    refusals.check_attention(instance)
    refusals.check_rows(model_kwargs.get("attention_mask"))  # perhaps made from padding tokens in the meantime
    positions.check_positions(generation_config, model_kwargs, None if is_made_here else cache)
    if mode == drafts.MODE:
        drafts.check_options(generation_config, instance, model_kwargs)
        drafts.check_takes_tokens_back(read_claim(unwrapped(instance)))
        drafts.check_assistant(given)
    rows = given["batch_size"] * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
    # it may be its own assistant, in the midst of another call
    facts = guarded(None, lambda: examine(unwrapped(instance), rows))
    if is_made_here:
        settings = Settings(**generation_config.cache_config)
        if cache is None:  # else it is a copy of one that was kept
            cache = SinkCache(**asdict(settings.sizes()))
        note(generation_config, settings.keep_streams)
    bind(cache, unwrapped(instance), facts)
    if is_made_here:
        model_kwargs[cache_argument(instance)] = cache
    else:
        wrapped(*args, **kwargs)
    drafts.prepare(generation_config, cache, mode)
    return None


def decode(wrapped: Wrapped, instance: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around `_sample` and `_beam_search`: a prompt that is to go in by pieces does so first."""
    return _decode(wrapped, instance, args, kwargs, drafting=False)


def decode_with_drafts(wrapped: Wrapped, instance: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around `_assisted_decoding`: all of the prompt but its last token goes in first, and is never taken back."""
    return _decode(wrapped, instance, args, kwargs, drafting=True)


def _decode(
    wrapped: Wrapped, instance: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, drafting: bool
) -> Any:
    bound = inspect.signature(wrapped).bind(*args, **kwargs)
    given, model_kwargs = bound.arguments, bound.arguments.setdefault("model_kwargs", {})
    cache = model_kwargs.get(cache_argument(instance))
    if not isinstance(cache, SinkCache):
        refusals.check_still_asked_for(given["generation_config"], cache)
        return guarded(None, functools.partial(wrapped, *args, **kwargs))
    if drafting:
        drafts.check_assistant(given)
    made = system.with_system(instance, given, model_kwargs, cache)
    if made is not cache:
        cache = made
        drafts.record_for_assistant(given["generation_config"], cache)
    loop, told = given.get("streamer"), (given["input_ids"], given["generation_config"], model_kwargs)
    if isinstance(loop, Loop):
        return loop.take_over(instance, cache, Prompt(instance, cache, *told, is_new=loop.is_new), given)
    positions.leave_out_healed(given["generation_config"], given["input_ids"], model_kwargs)
    kept = KeptCall.of(instance, cache, given["input_ids"], given["generation_config"], model_kwargs)
    if kept is not None:
        cache = model_kwargs[cache_argument(instance)] = kept.cache
    prompt = Prompt(instance, cache, *told, is_whole=kept is not None)
    if drafting:
        drafts.check_history(prompt.columns)

    def run() -> Any:
        prompt.feed_ahead(drafting=drafting, kept=kept)
        with drafts.recorded(cache, drafting=drafting):
            return wrapped(*bound.args, **bound.kwargs)

    with contextlib.nullcontext() if kept is None else kept.kept():
        return guarded(cache, run)


def may_compile(wrapped: Wrapped, instance: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around `_valid_auto_compile_criteria`: calls over a sink cache are compiled like those over a static one."""
    given = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    cache, criteria = given["model_kwargs"].get(cache_argument(instance)), functools.partial(wrapped, *args, **kwargs)
    if not isinstance(cache, SinkCache):
        return criteria()
    return graph.may_compile(instance, cache, given["generation_config"], criteria)


def compiled_call(wrapped: Wrapped, instance: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around `get_compiled_call`: what it returns begins the forward over a sink cache first."""
    return graph.compiled_call(instance, functools.partial(wrapped, *args, **kwargs))


WRAPPERS: dict[Role, Callable[..., Any]] = {
    Role.PREPARE_GENERATION_CONFIG: prepare_generation_config,
    Role.PREPARE_CACHE: prepare_cache,
    Role.DECODE: decode,
    Role.DECODE_WITH_DRAFTS: decode_with_drafts,
    Role.MAY_COMPILE: may_compile,
    Role.COMPILED_CALL: compiled_call,
    Role.INITIAL_CACHE_POSITION: initial_cache_position,
    Role.PREPARE_INPUTS: prepare_inputs,
    Role.KEEP_CACHE: keep_cache,
}
"""Which wrapper goes around a method of transformers, by the role that the record of its versions gives it."""
