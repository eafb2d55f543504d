"""Which calls of `generate` can go on in a kept stream, and the text of their prompt."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sink_patch.compat.models import TYPES
from sink_patch.models.entries import CACHE_NAMES

_OF_TEXT = frozenset({"attention_mask", "position_ids", "cache_position", "use_cache", "logits_to_keep", *CACHE_NAMES})
_OF_GENERATE = frozenset(
    {"tokenizer", "assistant_tokenizer"}
)  # some versions hand them on; `transformers serve` gives one


@dataclass(frozen=True)
class TextPrompt:
    """The prompt of one row.

    Args:
        text: ids of it.
        padding: columns before it.
        most: tokens that the stream will have read when the call ends, at most.
    """

    text: array[int]
    padding: int
    most: int

    @classmethod
    def read(cls, input_ids: torch.Tensor, generation_config: Any, mask: Any) -> TextPrompt | None:
        """From ids and mask, [1, columns] both; None: there is padding elsewhere than before the text, or no text."""
        ids, padding = array("q", input_ids[0].tolist()), 0
        if mask is not None:
            real = [bool(one) for one in mask[0].tolist()] if mask.ndim == 2 else []
            padding = real.index(True) if True in real else len(real)
            if len(real) != len(ids) or not all(real[padding:]):
                return None
        if len(ids) == padding:
            return None
        return cls(ids[padding:], padding, max(generation_config.max_length, len(ids)) - padding)


def is_text_of_one_row(
    instance: nn.Module, input_ids: torch.Tensor, generation_config: Any, model_kwargs: Mapping[str, Any]
) -> bool:
    """Whether a call has one row of text and nothing else on which its keys depend."""
    rows = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1, input_ids.shape[0])
    if rows > 1:
        return False
    if "prepare_inputs_for_generation" in vars(instance):  # prompt tuning of PEFT puts embeddings of its own in front
        return False
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return False  # each process would have to find the same stream
    others = model_kwargs.keys() - _OF_TEXT - _OF_GENERATE
    return all(_says_nothing(name, model_kwargs[name]) for name in others)


def _says_nothing(name: str, value: Any) -> bool:
    """Whether this argument of the model is as if it had not been given."""
    if name in TYPES and isinstance(value, torch.Tensor):
        return not value.any()
    if isinstance(value, dict):  # of what encoders have made, by kinds of images
        return all(one is None for one in value.values())
    return value is None or value is False
