"""Which calls of `generate` can go on in a kept stream, and the text of their prompt, with its images."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sink_patch.compat.models import TYPES
from sink_patch.models.entries import CACHE_NAMES
from sink_patch.models.families.media import KINDS
from sink_patch.streaming.media.images import UNKNOWN, of_kind

_OF_TEXT = frozenset({"attention_mask", "position_ids", "cache_position", "use_cache", "logits_to_keep", *CACHE_NAMES})
_OF_GENERATE = frozenset(
    {"tokenizer", "assistant_tokenizer"}
)  # some versions hand them on; `transformers serve` gives one


@dataclass(frozen=True)
class TextPrompt:
    """The prompt of one row, in which ids stand for its images.

    Args:
        text: ids of it.
        padding: columns before it.
        images: digests of its images, those of each kind in their order.
        stand: ids that stand for images in a text of this model.
    """

    text: array[int]
    padding: int
    images: tuple[str, ...] = ()
    stand: frozenset[int] = frozenset()

    @classmethod
    def read(
        cls, input_ids: torch.Tensor, mask: Any, images: Sequence[str] = (), stand: frozenset[int] = frozenset()
    ) -> TextPrompt | None:
        """From ids and mask, [1, columns] both.

        None: there is padding elsewhere than before the text, or no text; or ids stand for images, and there are none.
        """
        ids, padding = array("q", input_ids[0].tolist()), 0
        if mask is not None:
            real = [bool(one) for one in mask[0].tolist()] if mask.ndim == 2 else []
            padding = real.index(True) if True in real else len(real)
            if len(real) != len(ids) or not all(real[padding:]):
                return None
        if len(ids) == padding:
            return None
        prompt = cls(ids[padding:], padding, tuple(images), stand)
        return None if prompt.images_end and not images else prompt

    @functools.cached_property
    def images_end(self) -> int:
        """Index of the token behind the last one that stands for an image; 0: there is none."""
        places = (place for place, token in enumerate(self.text) if token in self.stand)
        return 1 + max(places, default=-1) if self.stand else 0

    def begins_with(self, images: Sequence[str]) -> bool:
        """Whether its first images, of each kind, are these."""
        both = ((of_kind(images, kind), of_kind(self.images, kind)) for kind in KINDS)
        return UNKNOWN not in images and all(theirs[: len(ours)] == ours for ours, theirs in both)


def is_text_of_one_row(
    instance: nn.Module, input_ids: torch.Tensor, generation_config: Any, model_kwargs: Mapping[str, Any]
) -> bool:
    """Whether a call has one row of text and nothing else on which its keys depend."""
    return is_of_one_row(instance, input_ids, generation_config) and not unknown_among(model_kwargs)


def is_of_one_row(instance: nn.Module, input_ids: torch.Tensor, generation_config: Any) -> bool:
    """Whether a call has one row, and its keys come about as transformers' own loop makes them."""
    rows = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1, input_ids.shape[0])
    if rows > 1:
        return False
    if "prepare_inputs_for_generation" in vars(instance):  # prompt tuning of PEFT puts embeddings of its own in front
        return False
    # else each process would have to find the same stream
    return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


def unknown_among(model_kwargs: Mapping[str, Any], known: frozenset[str] = frozenset()) -> list[str]:
    """The arguments of a call, but text and what is known, on which its keys may depend."""
    others = model_kwargs.keys() - _OF_TEXT - _OF_GENERATE - known
    return [name for name in others if not _says_nothing(name, model_kwargs[name])]


def _says_nothing(name: str, value: Any) -> bool:
    """Whether this argument of the model is as if it had not been given."""
    if name in TYPES and isinstance(value, torch.Tensor):
        return not value.any()
    if isinstance(value, dict):  # of what encoders have made, by kinds of images
        return all(one is None for one in value.values())
    return value is None or value is False
