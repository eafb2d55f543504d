"""What `generate` cannot do with a sink cache, and what contradicts itself: raised before any model runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sink_patch.arguments import CACHE_IMPLEMENTATION, SYSTEM, Settings, runs_of_ids
from sink_patch.cache.sink_cache import SinkCache
from sink_patch.errors import CacheStateError, SinkArgumentError, UnsupportedGenerationError
from sink_patch.generation import drafts
from sink_patch.generation.inputs.later import columns_of
from sink_patch.generation.inputs.system import check_has_ids
from sink_patch.generation.request import Request
from sink_patch.models.claims import read_claim
from sink_patch.models.entries import cache_argument, unwrapped
from sink_patch.rules.padding import check_left_padded
from sink_patch.streaming.media.given import check_cut, check_media

_MODES = ("greedy_search", "sample", "beam_search", "beam_sample", drafts.MODE)


def check_no_sizes(request: Request, asked: str | None) -> None:
    """Settings of the sink cache without the sink cache; a config that asks for another one may still hold them."""
    given = request.arguments if request.passed_names_a_cache else request.given_with_call()
    names = [name for name in Settings.names() if name in given]
    if names:
        raise SinkArgumentError(
            f"{' and '.join(names)} belong to the sink cache, but cache_implementation is {asked!r}. Add "
            f"cache_implementation={CACHE_IMPLEMENTATION!r}, or leave them out."
        )


def check_call(model: nn.Module, request: Request, generation_config: Any, model_kwargs: Mapping[str, Any]) -> None:
    """All that the arguments of a call tell by themselves, the cache aside.

    Args:
        generation_config: as transformers has completed it for this call.
        model_kwargs: the arguments that go to the model.

    Raises:
        SinkArgumentError: arguments that contradict each other.
        UnsupportedGenerationError: what cannot be right with a sink cache.
        UnsupportedModelError: the model cannot stream, as its config tells.
    """
    if request.refuses_cache:
        raise SinkArgumentError(
            "A sink cache was asked for together with use_cache=False. Leave out use_cache, or pass "
            "cache_implementation=None and no past_key_values."
        )
    _check_options(generation_config)
    mode = generation_config.get_generation_mode().value  # an assistant model, which is not known yet, adds one mode
    check_mode(mode)
    claim = read_claim(unwrapped(model))
    if mode == drafts.MODE:
        drafts.check_options(generation_config, model, model_kwargs)
        drafts.check_takes_tokens_back(claim)
    check_rows(model_kwargs.get("attention_mask"))
    cache = model_kwargs.get(cache_argument(model))
    read = cache.get_seq_length() if isinstance(cache, SinkCache) else 0
    media = check_media(model, model_kwargs, read)
    ids, piece = model_kwargs.get("input_ids"), generation_config.prefill_chunk_size
    if media and ids is not None:
        sizes = cache.sizes if isinstance(cache, SinkCache) else request.settings().sizes()
        at_once = max(claim.context.length, sizes.window_length - sizes.num_sink_tokens) if piece is None else piece
        if (new := columns_of(ids, model_kwargs, read).new) > at_once:
            check_cut(unwrapped(model), media, new)


def _check_options(generation_config: Any) -> None:
    """Options of other modules of transformers that know caches of their own only."""
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


def check_own_cache(cache: SinkCache, request: Request, model_kwargs: Mapping[str, Any]) -> None:
    """The user's cache beside arguments that ask for another one, or for other sizes, or that it cannot take.

    Raises:
        CacheStateError: another call of `generate` over it has not ended, in another thread or around this one.
    """
    if cache._streams is not None and cache._streams.call is not None:
        raise CacheStateError(
            f"generate was called with {cache!r} in the middle of another call over it, whose text would go on from "
            "what this one reads. Wait for its end, or use another SinkCache."
        )
    _check_embeds(model_kwargs, cache)
    if request.of_call not in (None, CACHE_IMPLEMENTATION):
        raise SinkArgumentError(
            f"cache_implementation={request.of_call!r} was asked for, together with a SinkCache in past_key_values. "
            "Leave one of them out."
        )
    given = {name: value for name, value in request.given_with_call().items() if hasattr(cache.sizes, name)}
    if given.get("num_sink_tokens") == SYSTEM:
        del given["num_sink_tokens"]  # whatever the cache has: it was made for its text
    for name, value in given.items():
        asked_for = runs_of_ids(name, value) if name == "turn_start" else value
        if asked_for != getattr(cache, name):
            raise SinkArgumentError(
                f"{name}={value!r} was given, but the SinkCache in past_key_values has {name}={getattr(cache, name)!r}"
                ". A cache keeps its sizes: leave the argument out, or pass no cache."
            )


def check_no_other_cache(cache: Any) -> None:
    """A sink cache asked for beside a cache of another kind."""
    if cache is not None:
        raise SinkArgumentError(
            f"cache_implementation={CACHE_IMPLEMENTATION!r} was asked for, together with a {type(cache).__name__} in "
            "past_key_values. Pass a SinkCache, or none, or cache_implementation=None."
        )


def check_still_asked_for(generation_config: Any, cache: Any) -> None:
    """The sink cache was made for this call, and something has taken it away before the first forward."""
    if getattr(generation_config, "cache_implementation", None) == CACHE_IMPLEMENTATION:
        raise UnsupportedGenerationError(
            f"cache_implementation={CACHE_IMPLEMENTATION!r} was asked for, but decoding begins with "
            f"{'no cache' if cache is None else f'a {type(cache).__name__}'}: the model, or another library, has taken "
            "the SinkCache away. Use another cache_implementation."
        )


def check_mode(mode: str) -> None:
    """Decoding modes that cannot use a sink cache."""
    if mode not in _MODES:
        raise UnsupportedGenerationError(
            f"The decoding mode {mode!r} was asked for with a sink cache, which it cannot use: it goes back over its "
            f"cache in ways of its own. Use one of {', '.join(_MODES)}, or another cache."
        )


def check_attention(model: Any) -> None:
    """Attention over pages, which a manager of continuous batching has set, and which reads no other cache."""
    if "paged" in str(getattr(model.config, "_attn_implementation", None)):
        raise UnsupportedGenerationError(
            f"generate was called with a sink cache while {type(model).__name__} serves continuous batching, whose "
            "attention reads pages alone. Stop its manager first, or ask it instead."
        )


def check_rows(attention_mask: Any) -> None:
    """Rows without a token, and padding to the right of one; shape [rows, columns]."""
    if not isinstance(attention_mask, torch.Tensor):
        return
    empty = (attention_mask != 0).sum(dim=-1) == 0  # [rows]
    if bool(empty.any()):
        raise SinkArgumentError(
            f"Row {empty.nonzero()[0].item()} of attention_mask is padding only. Every row needs a token to start from."
        )
    check_left_padded(attention_mask[:, -2:] != 0, to_the_end=True)


def _check_embeds(model_kwargs: Mapping[str, Any], cache: SinkCache) -> None:
    """Embeddings where messages leave, and those of new tokens alone, which transformers takes for the history."""
    check_has_ids(cache.sizes.as_settings(), model_kwargs)
    embeds, mask, read = model_kwargs.get("inputs_embeds"), model_kwargs.get("attention_mask"), cache.get_seq_length()
    if embeds is None or not read:
        return
    columns = embeds.shape[1]
    if columns <= read or (mask is not None and columns < mask.shape[-1]):
        raise SinkArgumentError(
            f"inputs_embeds of {columns} columns were given with a SinkCache that has seen {read}. transformers takes "
            "embeddings for the whole history: pass that, or the new tokens as input_ids."
        )
