"""Where models of transformers differ from version to version: one function serves all versions."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""What forwards call their cache: from 5.24 on; before; and before in models of states alone (Mamba)."""


def decoder_of(model: Any) -> Any:
    """What `get_decoder()` finds; the model itself where there is no such method."""
    found = model.get_decoder() if hasattr(model, "get_decoder") else model
    if isinstance(found, nn.Module):
        return found
    return found()  # 4.53 and 4.54: some vision-language models return the method of their inner model


def state_arguments(number_of_states: int) -> Mapping[str, int]:
    """Arguments of `LinearAttentionLayer`: versions whose layers have one state each take no number of them."""
    return {} if number_of_states == 1 else {"number_of_states": number_of_states}


def arguments_of_a_prompt(read: int, end: int, device: torch.device) -> dict[str, Any]:
    """What `prepare_inputs_for_generation` must be told of columns of a prompt, from `read` to `end`.

    Up to 5.3 where they stand, from 5.0 on that they are of a prompt.
    """
    named = _arguments_of_inputs()
    told = {"cache_position": torch.arange(read, end, device=device), "is_first_iteration": True}
    return {name: value for name, value in told.items() if name in named}


@functools.cache
def _arguments_of_inputs() -> frozenset[str]:
    from transformers.generation.utils import GenerationMixin

    return frozenset(inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters)


def rope_parameters(config: Any) -> Mapping[str, Any]:
    """The rope parameters of a text config, or a dict of them for each layer type; `rope_scaling` in 4.x."""
    found: Mapping[str, Any] | None = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    return found or {}


def frequencies_of_short_texts(module: nn.Module, name: str, buffer: torch.Tensor) -> torch.Tensor:
    """The inverse frequencies [rotary_dim / 2] that a rotary module uses within its original context.

    Some rope types change the buffer in the forward, and keep its first values as `original_inv_freq`
    (`dynamic_rope_update` in modeling_rope_utils.py).

    Args:
        module: the rotary module.
        name: of its `inv_freq` buffer, which may begin with a layer type.
        buffer: what it holds now.
    """
    original: torch.Tensor = getattr(module, re.sub(r"inv_freq$", "original_inv_freq", name), buffer)
    if original.is_meta:
        return buffer  # 5.x: loading leaves a tensor that is not a buffer without values; the model cannot use it
    if "longrope" in str(getattr(module, "rope_type", "")):
        return original  # put into the buffer at each forward
    # 4.x: the original is not a buffer, so a cast of the model leaves it as it was, and the model does not use it
    return buffer if torch.equal(original.to(buffer), buffer) else original
