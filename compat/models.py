"""Where models of transformers differ from version to version: one function serves all versions.

What continuous batching has for them is looked up when it is needed, as versions before 5.18 lack it.
"""

from __future__ import annotations

import functools
import inspect
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
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


def maker_of_positions(model: nn.Module) -> Callable[..., Any] | None:
    """The method that makes positions of several coordinates of a text with images; None: there is none.

    It takes ids and mask, [rows, columns], what is told of images, and from 5.0 on the types of the ids; and returns
    positions [3, rows, columns], which begin at 0 in each row, and something else.
    """
    parts: Sequence[Any] = [part for part in model.modules() if hasattr(part, "get_rope_index")]
    return parts[0].get_rope_index if parts else None


TYPES = ("token_type_ids", "mm_token_type_ids")
"""What forwards call the types of their columns: text, or an image."""


FULL, SLIDING = "full_attention", "sliding_attention"
"""How continuous batching calls the groups of layers that share an allocator."""


def group_layers(config: Any) -> Mapping[str, Sequence[int]]:
    """The layers of a text config, by the group that they are in.

    Raises:
        ValueError: transformers has no group for one of them.
    """
    from transformers.generation.continuous_batching.cache import group_layers_by_attn_type

    groups: Mapping[str, Sequence[int]] = group_layers_by_attn_type(config)
    return groups


def page_shape(config: Any) -> tuple[int, int]:
    """(heads, dim) of a key and a value, as pages hold them."""
    from transformers.generation.continuous_batching.utils import find_head_dim, find_num_key_value_heads

    return find_num_key_value_heads(config), find_head_dim(config)


def storing_first() -> Callable[..., Any]:
    """The method of an allocator that stores new tokens, and then reads."""
    from transformers.generation.continuous_batching.cache_allocators import FullAttentionCacheAllocator

    return FullAttentionCacheAllocator.update


def reading_first() -> Callable[..., Any]:
    """The method of an allocator that reads first, with new tokens in the places of sentinels."""
    from transformers.generation.continuous_batching.cache_allocators import SlidingAttentionCacheAllocator

    return SlidingAttentionCacheAllocator.update


def inputs_of(inputs: Any) -> Sequence[Any]:
    """The inputs that batches are written into on the host; asynchronous batching has two of them."""
    pairs: Sequence[Any] | None = getattr(inputs, "io_pairs", None)
    return [inputs] if pairs is None else [pair.host_io for pair in pairs]


def stand_before(ours: Any, theirs: Any, *names: str) -> None:
    """Let methods of an object of ours be called in place of those of one object of transformers.

    Only that object is changed: the method that it had is the first argument of ours.
    """
    for name in names:
        setattr(theirs, name, functools.partial(getattr(ours, name), _not_holding(getattr(theirs, name))))


def _not_holding(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that does not hold its object, which would hold itself by it, and so its model for a while."""
    if not inspect.ismethod(method):
        return method
    held = weakref.WeakMethod(method)

    def called(*args: Any, **kwargs: Any) -> Any:
        there: Any = held()  # whoever calls it holds the object
        return there(*args, **kwargs)

    return called


def small_manager(model: Any, batch_tokens: int) -> Any:
    """A manager of continuous batching for few short requests, synchronous, as transformers makes it."""
    from transformers import ContinuousBatchingConfig, GenerationConfig
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

    config = ContinuousBatchingConfig(
        page_size=4, num_blocks=16, max_batch_tokens=batch_tokens, use_async_batching=False, use_cuda_graph=False
    )
    config.auto_switch_to_flash = False  # the attention of the model is tried; 5.18 does not know it, and has no other
    make: Any = GenerationConfig
    plain = make(cache_implementation="paged", do_sample=False, eos_token_id=-1, max_new_tokens=1)
    return ContinuousBatchingManager(model=model, generation_config=plain, continuous_batching_config=config)


def request(request_id: str, ids: list[int]) -> Any:
    """A request for one token more."""
    from transformers.generation.continuous_batching.requests import RequestState

    return RequestState(request_id=request_id, initial_tokens=ids, max_new_tokens=1)
