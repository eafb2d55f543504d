"""What `sink_patch.stream` is given: a text in ids, and arguments of `generate` that have a meaning there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sink_patch.arguments import CACHE_IMPLEMENTATION
from sink_patch.cache.sink_cache import SinkCache
from sink_patch.errors import SinkArgumentError, UnsupportedGenerationError, UnsupportedModelError
from sink_patch.models.entries import input_device
from sink_patch.models.families.media import media_tokens
from sink_patch.streaming.media.given import media_among
from sink_patch.streaming.media.placing import of_images

Messages = Sequence[Mapping[str, Any]]

_OF_THE_TEXT = ("inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids")
_OF_THE_CALL = (
    *("streamer", "max_length", "return_dict_in_generate", "output_scores", "output_logits", "output_attentions"),
    *("output_hidden_states", "custom_generate", "assistant_model", "keep_streams", "synced_gpus", "adapter_names"),
)
_NO_STREAM = {"num_beams": 1, "num_return_sequences": 1, "prompt_lookup_num_tokens": None, "penalty_alpha": None}
_NO_STREAM |= {"token_healing": False}  # of a prompt's end, where the text of a stream goes on
"""Options, and the value with which there is one text that grows by a token a step."""


def inputs_of(model: nn.Module, tokenizer: Any, given: Any, read: int) -> tuple[torch.Tensor, dict[str, Any]]:
    """Ids [1, tokens] of what is to be read, and the images and sounds of a chat, with all that tells of them.

    Args:
        read: columns that the cache has read before, the images in them too.

    Raises:
        SinkArgumentError: as for `stream`.
    """
    more: dict[str, Any] = {}
    if isinstance(given, torch.Tensor):
        ids = given if given.ndim == 2 else given[None]
    elif isinstance(given, str):
        ids = tokenizer(given, return_tensors="pt", add_special_tokens=not read)["input_ids"]
    elif isinstance(given, Sequence) and given and all(isinstance(message, Mapping) for message in given):
        more = _written(tokenizer, given)
        ids = more.pop("input_ids")
    else:
        raise SinkArgumentError(
            f"A {type(given).__name__} was given to stream. Give a text, a chat (a list of messages, each a dict with "
            "role and content), or ids [1, tokens]; of several texts make several streams."
        )
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] == 0 or ids.is_floating_point():
        raise SinkArgumentError(
            f"A stream was to begin with ids of shape {list(ids.shape)}. It needs one token at least, and has one row: "
            "give a text that is not empty; of several texts make several streams."
        )
    device = input_device(model)
    return ids.long().to(device), _of_images(model, ids[:, read:] if ids.shape[1] > read else ids, more, device)


def _of_images(model: nn.Module, new: torch.Tensor, written: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """What a chat template returned beside ids; nothing where no image is among the new ids [1, tokens]."""
    tokens = media_tokens(getattr(model, "config", None))
    given = media_among(model, written)
    if not given or (tokens and not bool(of_images(new, tokens).any())):
        return {}
    dtype = getattr(model, "dtype", None)
    return {
        name: value.to(device, dtype if name in given and value.is_floating_point() else None)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in written.items()
    }


def _written(tokenizer: Any, messages: Messages) -> dict[str, Any]:
    """All that the chat template returns but the mask."""
    try:
        written = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    except Exception as failure:  # templates are programs, and raise what they like
        raise SinkArgumentError(
            f"The chat template of this {type(tokenizer).__name__} cannot be applied to the messages: {failure} Pass "
            "messages that it takes, or a text."
        ) from failure
    return {name: value for name, value in written.items() if name != "attention_mask"}


def asked_for(name: str, arguments: Mapping[str, Any], config: Any) -> Any:
    """What was passed, as an argument or in the passed config; what the model's own config says is for `generate`."""
    return arguments[name] if name in arguments else getattr(config, name, None)


def check(model: Any, tokenizer: Any, arguments: Mapping[str, Any], config: Any, cache: Any) -> None:
    """Refuse what has no meaning in a stream.

    Raises:
        SinkArgumentError: as it says.
        UnsupportedGenerationError: with this adapter.
        UnsupportedModelError: no model was given.
    """
    if cache is not None and not isinstance(cache, SinkCache):
        raise SinkArgumentError(
            f"A {type(cache).__name__} was given to stream as past_key_values. Pass a SinkCache, or none."
        )
    for name in _OF_THE_TEXT:
        if arguments.get(name) is not None:
            raise SinkArgumentError(f"{name} was given to stream. Give the ids in place of the text.")
    for name in _OF_THE_CALL:
        if arguments.get(name) is not None:
            raise SinkArgumentError(
                f"{name} was given to stream, where it has no meaning: text comes piece by piece, and ends with "
                "max_new_tokens if at all. Leave it out, or use model.generate."
            )
    asked = asked_for("cache_implementation", arguments, config)
    if asked not in (None, CACHE_IMPLEMENTATION):
        raise SinkArgumentError(f"cache_implementation={asked!r} was given to stream, which needs a sink cache.")
    if not hasattr(model, "generation_config"):
        raise UnsupportedModelError(f"A {type(model).__name__} was given to stream. Pass a model of transformers.")
    if not callable(getattr(tokenizer, "decode", None)):
        raise SinkArgumentError(
            f"A {type(tokenizer).__name__} was given to stream as the tokenizer. Pass the model's, or its processor."
        )
    _check_adapter(model)
    _check_options(arguments, config, model.generation_config)


def _check_adapter(model: Any) -> None:
    """Refuse adapters that PEFT brings in a method of its own around `generate`, behind which a stream goes on.

    Raises:
        UnsupportedGenerationError: prompt tuning and its kin, or one that begins within a prompt (Activated LoRA).
    """
    config = getattr(model, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False) or getattr(config, "alora_invocation_tokens", None):
        raise UnsupportedGenerationError(
            f"A {type(model).__name__} with {type(config).__name__} was given to stream, and PEFT adds what it learned "
            "in calls of generate alone. Use model.generate, or another adapter."
        )


def _check_options(arguments: Mapping[str, Any], config: Any, own: Any) -> None:
    most = asked_for("max_new_tokens", arguments, config)
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
        raise SinkArgumentError(
            f"max_new_tokens={most!r} was given to stream. Give a number of tokens, or leave it out."
        )
    for name, value in _NO_STREAM.items():
        asked = asked_for(name, arguments, config)
        asked = getattr(own, name, None) if asked is None else asked
        if asked not in (None, value):
            raise SinkArgumentError(
                f"{name}={asked!r} is asked for in a stream, which has one text that grows token by token. Pass "
                f"{name}={value!r}, or use model.generate."
            )


def taken(arguments: dict[str, Any]) -> dict[str, Any]:
    """Take from the arguments those that are no objects of a call, for a generation config."""
    of_calls = ("logits_processor", "stopping_criteria", "tokenizer", "prefix_allowed_tokens_fn")
    return {name: arguments.pop(name) for name in list(arguments) if name not in of_calls}
