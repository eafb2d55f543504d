"""The system message of a call stays: how many sinks that is, by the ids of its rows (`num_sink_tokens="system"`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sink_patch.arguments import CACHE_IMPLEMENTATION, SYSTEM, TURNS, Settings, Sizes
from sink_patch.cache.binding import bind, check_ids
from sink_patch.cache.sink_cache import SinkCache
from sink_patch.errors import SinkArgumentError
from sink_patch.history.beginnings import begins, first_beginning
from sink_patch.models.entries import cache_argument, unwrapped


def check_settings(
    model: nn.Module, settings: Settings, generation_config: Any, model_kwargs: Mapping[str, Any]
) -> None:
    """Refuse settings of a call that find messages by ids, where there are no ids, or not these.

    Those of an assistant are its target's, and may mean nothing to it.

    Raises:
        SinkArgumentError: embeddings were given, or the ids are not of the model's vocabulary.
    """
    check_has_ids(settings, model_kwargs)
    if not getattr(generation_config, "is_assistant", None):
        check_ids(unwrapped(model), "turn_start", settings.turn_start)
        check_ids(unwrapped(model), "system_start", settings.system_start)


def check_has_ids(settings: Settings, model_kwargs: Mapping[str, Any]) -> None:
    """Refuse embeddings where messages are to be found by their ids.

    Raises:
        SinkArgumentError: as it says.
    """
    if model_kwargs.get("inputs_embeds") is None:
        return
    for name, asked, instead in (("num_sink_tokens", SYSTEM, "a number of tokens"), ("evict", TURNS, "'tokens'")):
        if getattr(settings, name) == asked:
            raise SinkArgumentError(
                f"inputs_embeds were given with {name}={asked!r}, which finds messages by their ids. Pass input_ids, "
                f"or use {name}={instead}."
            )


def with_system(
    model: nn.Module, given: Mapping[str, Any], model_kwargs: dict[str, Any], cache: SinkCache
) -> SinkCache:
    """The cache of a call: another one in its place where its sinks are to be the system message.

    Args:
        given: the arguments of `_sample` and its kin.
        model_kwargs: of the call, which hold the cache.
        cache: fresh where it was made for the call.

    Raises:
        SinkArgumentError: the system messages of the rows are not of one length, or leave no room in the window.
    """
    config = given["generation_config"]
    if (
        config.cache_implementation != CACHE_IMPLEMENTATION
        or not (settings := Settings(**config.cache_config)).keeps_system
    ):
        return cache
    number = _number_of_sinks(given["input_ids"], model_kwargs, settings, config)
    if number == cache.num_sink_tokens:
        return cache
    if number >= settings.window_length:
        raise SinkArgumentError(
            f"num_sink_tokens={SYSTEM!r}: the system message has {number} tokens, and leaves no room in a window of "
            f"window_length={settings.window_length}. Use a window_length of {number + 1} at least, better of many "
            "more; or give num_sink_tokens as a number."
        )
    sizes = replace(cache.sizes, num_sink_tokens=number)
    made = SinkCache(sizes.window_length, number, evict=sizes.evict, turn_start=sizes.turn_start)
    bind(made, unwrapped(model))
    model_kwargs[cache_argument(model)] = made
    return made


def sizes_of_call(
    settings: Settings, ids: torch.Tensor, model_kwargs: Mapping[str, Any], generation_config: Any
) -> Sizes | None:
    """Of the cache that a call asks for with ids [rows, columns]; None: it leaves no room, which `with_system` refuses.

    Raises:
        SinkArgumentError: the system messages of the rows are not of one length.
    """
    if not settings.keeps_system:
        return settings.sizes()
    number = _number_of_sinks(ids, model_kwargs, settings, generation_config)
    return None if number >= settings.window_length else settings.sizes(number)


def _rows(ids: torch.Tensor, mask: Any) -> list[list[int]]:
    """The tokens of each row of ids [rows, columns], without padding."""
    if not isinstance(mask, torch.Tensor) or mask.shape != ids.shape:
        return [list(row) for row in ids.tolist()]
    real = (mask != 0).tolist()
    return [
        [token for token, is_real in zip(*one, strict=True) if is_real] for one in zip(ids.tolist(), real, strict=True)
    ]


def _number_of_sinks(
    ids: torch.Tensor, model_kwargs: Mapping[str, Any], settings: Settings, generation_config: Any
) -> int:
    bos = generation_config.bos_token_id
    firsts = bos if isinstance(bos, Sequence) else [bos]
    rows = _rows(ids, model_kwargs.get("attention_mask"))
    lengths = [_length_of_system(row, settings, firsts) for row in rows]
    numbers = [Sizes.num_sink_tokens if length is None else length for length in lengths]
    if len(set(numbers)) > 1:
        named = ", ".join("none" if length is None else str(length) for length in lengths)
        raise SinkArgumentError(
            f"num_sink_tokens={SYSTEM!r}: the rows of input_ids begin with system messages of different lengths, in "
            f"tokens {named}, and a cache has one number of sinks. Generate such rows one by one, or give "
            "num_sink_tokens as a number."
        )
    return numbers[0]


def _length_of_system(ids: Sequence[int], settings: Settings, firsts: Sequence[int | None]) -> int | None:
    """Tokens before the second message, all where there is none.

    None: the row does not begin with a system message.

    Args:
        firsts: ids of which one may stand before the first message (BOS).
    """
    for place in (0, 1):
        length = begins(ids, settings.system_start, place)
        if length and (place == 0 or ids[0] in firsts):
            second = first_beginning(ids, settings.turn_start, range(place + length, len(ids)))
            return len(ids) if second is None else second
    return None
