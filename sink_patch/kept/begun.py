"""What a call that may go on in a kept stream finds: the stream, and what its model is by then.

A call of text alone looks when its prompt is about to go in (calls.py). With images that is too late: encoders have
seen all of them by then. So it looks at its very beginning, and what was found is noted on its generation config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from sink_patch.arguments import Sizes
from sink_patch.cache.sink_cache import SinkCache
from sink_patch.compat.models import TYPES
from sink_patch.kept.entry import copy_to_go_on, images_of
from sink_patch.kept.prompts import TextPrompt, is_of_one_row, is_text_of_one_row, unknown_among
from sink_patch.kept.sameness import Digest, settings_of, weights_of
from sink_patch.kept.store import Found, store
from sink_patch.models.entries import unwrapped
from sink_patch.models.families.media import media_of, media_tokens, prompt_is_one
from sink_patch.streaming.media.given import media_among
from sink_patch.streaming.media.images import NUMBERS, OF_IMAGES, UNKNOWN, Images, digests_by_row, images_among

_NAME = "_kept_with_images"
_KNOWN = OF_IMAGES.union(TYPES, {NUMBERS, "input_ids"})


@dataclass(frozen=True)
class Begun:
    """A call whose stream may be kept.

    Args:
        prompt: of the call.
        weights, settings: of its model, when it looked.
        found: the kept stream with which it goes on, and `cache`, the copy in which it does; None: it begins anew.
    """

    prompt: TextPrompt
    weights: Digest
    settings: Digest
    found: Found | None = None
    cache: SinkCache | None = None

    def __deepcopy__(self, _memo: dict[int, Any]) -> Begun:
        return self  # a config may be copied; the call is the same one

    @classmethod
    def of_text(
        cls,
        instance: nn.Module,
        input_ids: torch.Tensor,
        generation_config: Any,
        model_kwargs: Mapping[str, Any],
        sizes: Sizes,
    ) -> Begun | None:
        """From the arguments of `_sample` and its kin; None: they are not those of one row of text alone.

        Args:
            input_ids: [rows, columns].
            sizes: of the cache that the call asks for.
        """
        if not is_text_of_one_row(instance, input_ids, generation_config, model_kwargs):
            return None
        stand = media_tokens(getattr(unwrapped(instance), "config", None))
        prompt = TextPrompt.read(input_ids, model_kwargs.get("attention_mask"), stand=stand)
        return cls._of(unwrapped(instance), prompt, sizes)

    @classmethod
    def with_images(
        cls, instance: nn.Module, generation_config: Any, model_kwargs: Mapping[str, Any], sizes: Sizes
    ) -> Begun | None:
        """From the arguments of `generate`; None: there are no images, or the call is none to be kept."""
        begun = cls._of(unwrapped(instance), _with_images(instance, generation_config, model_kwargs), sizes)
        if begun is None or begun.found is None:
            return begun
        some_are_read = 0 < len(images_of(begun.found.cache)) < len(begun.prompt.images)
        return begun.anew() if some_are_read and NUMBERS in model_kwargs else begun  # by which an image may differ

    @classmethod
    def _of(cls, model: nn.Module, prompt: TextPrompt | None, sizes: Sizes) -> Begun | None:
        is_one = prompt_is_one(getattr(model, "config", None))
        settings = None if prompt is None or is_one else settings_of(model)
        weights = None if settings is None else weights_of(model)
        if prompt is None or settings is None or weights is None:
            return None
        found = store.find(model, weights, settings, sizes, prompt)
        copied = None if found is None else copy_to_go_on(found.cache, found.tokens, prompt.padding)
        return cls(prompt, weights, settings, found, copied)

    def anew(self) -> Begun:
        """The call when it begins with an empty cache."""
        return replace(self, found=None, cache=None)

    def at_prompt(self, instance: nn.Module) -> Begun | None:
        """The call when its prompt is about to go in; None: its model has changed in a way that is not known.

        The first call of a model has put hooks on it since it began.
        """
        settings = settings_of(unwrapped(instance)) if self.found is None else self.settings
        return None if settings is None else replace(self, settings=settings)


def note(generation_config: Any, call: Begun | None) -> None:
    """Of the call whose config that is, which is a copy of its own."""
    setattr(generation_config, _NAME, call)


def noted_on(generation_config: Any) -> Begun | None:
    """What was noted on it."""
    found: Begun | None = vars(generation_config).get(_NAME)
    return found


def is_copy(generation_config: Any, cache: Any) -> bool:
    """Whether a cache is the copy of a kept stream in which the call goes on, and none of the caller's own."""
    begun = noted_on(generation_config)
    return begun is not None and begun.cache is not None and begun.cache is cache


def _with_images(instance: nn.Module, generation_config: Any, model_kwargs: Mapping[str, Any]) -> TextPrompt | None:
    """The prompt of a call with images; None: it has none, or its keys depend on more than ids and these."""
    model, ids, mask = unwrapped(instance), model_kwargs.get("input_ids"), model_kwargs.get("attention_mask")
    if not media_among(model, model_kwargs) or not isinstance(ids, torch.Tensor) or ids.ndim != 2:
        return None
    pad = getattr(generation_config, "pad_token_id", None)
    is_plain = (
        is_of_one_row(instance, ids, generation_config)
        and not unknown_among(model_kwargs, _KNOWN)
        and not getattr(generation_config, "is_assistant", None)
        and not getattr(generation_config, "token_healing", None)
        and not (mask is None and pad is not None and bool((ids == pad).any()))  # transformers will make a mask
    )
    images, stand = images_among(model, model_kwargs), media_tokens(model.config)
    if not is_plain or images is None or not _types_follow(ids, stand, model_kwargs):
        return None
    (digests,) = digests_by_row(images, ids, model.config)
    is_known = media_of(model.config) is not None and UNKNOWN not in digests and _are_told_apart(model.config, images)
    return TextPrompt.read(ids, mask, digests, stand) if is_known else None


def _types_follow(ids: torch.Tensor, stand: frozenset[int], model_kwargs: Mapping[str, Any]) -> bool:
    """Whether types of tokens [rows, columns] say no more than ids do: which of them stand for images."""
    of_image = torch.isin(ids, torch.tensor(sorted(stand), dtype=ids.dtype, device=ids.device))
    given = [model_kwargs[name] for name in TYPES if model_kwargs.get(name) is not None]
    return all(isinstance(one, torch.Tensor) and torch.equal(one.to(ids.device) != 0, of_image) for one in given)


def _are_told_apart(config: Any, images: list[Images]) -> bool:
    """Whether different ids stand for images of different kinds: else it is not known which come first."""
    tokens = [media_tokens(config, [one.kind]) for one in images]
    return sum(map(len, tokens)) == len(frozenset[int]().union(*tokens))
