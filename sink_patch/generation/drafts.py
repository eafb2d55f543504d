"""Decoding with drafts (an assistant model, prompt lookup): what is asked of both caches, and what is refused."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from sink_patch.arguments import CACHE_IMPLEMENTATION, TOKENS, Settings
from sink_patch.cache.sink_cache import SinkCache
from sink_patch.errors import UnsupportedGenerationError
from sink_patch.models.claims import Claim, read_claim
from sink_patch.models.entries import CACHE_NAMES, text_config, unwrapped
from sink_patch.models.examine import examine
from sink_patch.rules.columns import Columns
from sink_patch.streaming.calls.guard import guarded
from sink_patch.streaming.media.given import media_among

MODE = "assisted_generation"

_OTHER_DRAFTS = ("assistant_early_exit", "use_mtp", "speculation_type")
_WHOLE_OUTPUTS = ("output_attentions", "output_hidden_states")
_LOOKBEHIND = 16  # tokens that an assistant with another tokenizer may take back beside its draft


def check_options(generation_config: Any, model: nn.Module, model_kwargs: Mapping[str, Any]) -> None:
    """Refuse options that cannot be right where decoding is with drafts and a sink cache.

    Args:
        generation_config, model, model_kwargs: of the call.

    Raises:
        UnsupportedGenerationError: with the reason.
    """
    for name in _OTHER_DRAFTS:
        if getattr(generation_config, name, None):
            raise UnsupportedGenerationError(
                f"{name}={getattr(generation_config, name)!r} was asked for with a sink cache, but such drafts "
                "come from a cache without end. Use an assistant_model or prompt_lookup_num_tokens, or another cache."
            )
    for name in _WHOLE_OUTPUTS:
        if getattr(generation_config, name, None):
            raise UnsupportedGenerationError(
                f"{name} was asked for with drafts and a sink cache, which takes the prompt in before transformers "
                "looks at its outputs. Leave it out, or decode without drafts."
            )
    if model_kwargs.get("inputs_embeds") is not None:
        raise UnsupportedGenerationError(
            "inputs_embeds was given with drafts (an assistant model, or prompt lookup), which are made from ids. Pass "
            "input_ids instead, or decode without drafts."
        )
    if media := media_among(model, model_kwargs):
        raise UnsupportedGenerationError(
            f"{', '.join(media)} was given with drafts (an assistant model, or prompt lookup) and a sink cache, which "
            "takes prompts of text alone then. Decode without drafts, or use another cache."
        )


def check_assistant(given: Mapping[str, Any]) -> None:
    """Refuse an assistant model, if there is one among these arguments, that cannot take tokens back; examine it.

    transformers changes one with another tokenizer before it runs, and its first call counts from then on.

    Raises:
        UnsupportedGenerationError: with the reason.
        UnsupportedModelError: it cannot stream at all.
    """
    assistant = given.get("assistant_model")
    if isinstance(assistant, nn.Module):
        check_takes_tokens_back(read_claim(unwrapped(assistant)))
        guarded(None, lambda: examine(unwrapped(assistant), 1))


def check_takes_tokens_back(claim: Claim) -> None:
    """Refuse a model, or an assistant, that cannot take tokens back.

    Raises:
        UnsupportedGenerationError: with the reason.
    """
    if claim.one_by_one is not None or claim.has_states:
        model = claim.model
        raise UnsupportedGenerationError(
            f"{type(model).__name__} ({text_config(model).model_type}) can neither make drafts nor decode with them: "
            "its recurrent states, or its masks, cannot take tokens back. Use another assistant_model, or decode "
            "without drafts."
        )


def check_history(columns: Columns) -> None:
    """Drafts are counted from the first token of the stream on, so all of it must be given.

    Raises:
        UnsupportedGenerationError: the new tokens alone were given.
    """
    if not columns.is_history:
        raise UnsupportedGenerationError(
            f"{columns.given} tokens of a stream of {columns.stream} were given as input_ids to decode with drafts, "
            "which transformers counts from the first token on. Pass the whole history as input_ids."
        )


def assistants_config(passed: Any, arguments: Mapping[str, Any]) -> Any:
    """What an assistant is asked for: a sink cache like its target's, that records its past. Else None.

    transformers copies the target's generation config for the assistant, but for the name of the cache.

    Args:
        passed: the generation config passed to `generate`, or None.
        arguments: the others of `generate`.
    """
    settings = getattr(passed, "cache_config", None)
    is_ours = isinstance(settings, Mapping) and set(Settings().as_dict()) <= set(settings) <= set(Settings.names())
    if not getattr(passed, "is_assistant", None) or not is_ours:
        return None
    config, is_first = copy.deepcopy(passed), all(arguments.get(name) is None for name in CACHE_NAMES)
    config.cache_implementation, config.cache_config = (CACHE_IMPLEMENTATION, settings) if is_first else (None, None)
    return config


def prepare(generation_config: Any, cache: SinkCache, mode: str) -> None:
    """Tell the sizes to an assistant to come; let an assistant's cache record as much as it may have to take back.

    Single tokens leave an assistant's window: what it may have to take back would hold whole messages there.
    """
    if mode == MODE:
        is_made_here = generation_config.cache_implementation == CACHE_IMPLEMENTATION
        settings = Settings(**generation_config.cache_config) if is_made_here else cache.sizes.as_settings()
        generation_config.cache_config = replace(settings, evict=TOKENS, keep_streams=0).as_dict()
    record_for_assistant(generation_config, cache)


def record_for_assistant(generation_config: Any, cache: SinkCache) -> None:
    """Let a cache record as much as it may have to take back, if it is an assistant's."""
    if getattr(generation_config, "is_assistant", None):
        cache.activate_past_recording(2 * (generation_config.max_new_tokens or 0) + _LOOKBEHIND)


@contextlib.contextmanager
def recorded(cache: SinkCache, *, drafting: bool = True) -> Iterator[None]:
    """Inside, rejected tokens can be taken back, where there are drafts."""
    if not drafting:
        yield
        return
    recording = cache.is_croppable
    cache.activate_past_recording()
    try:
        yield
    finally:
        if not recording:
            cache.deactivate_past_recording()
