"""What a forward over kept tokens gives, images among them: by the model itself, over what it made of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sink_patch.models.entries import names_of_cache


@torch.no_grad()
def embedded(model: PreTrainedModel, given: dict[str, Any], stream: torch.Tensor) -> dict[str, Any]:
    """What the decoder is given for a prompt and the text after it: embeddings [rows, columns, hidden], positions.

    Args:
        given: the prompt, as `prompt` makes it.
        stream: ids of the text behind it, [rows, columns].
    """
    seen: dict[str, Any] = {}

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)

    handle = text_decoder(model).register_forward_pre_hook(look, with_kwargs=True)
    more = {name: longer(value, stream) for name, value in given.items() if name in OF_COLUMNS}
    more["input_ids"] = torch.cat((given["input_ids"], stream), dim=1)
    try:
        model(**{**given, **more}, use_cache=False)
    finally:
        handle.remove()
    return seen


@torch.no_grad()
def fresh(model: PreTrainedModel, embeddings: torch.Tensor, **positions: torch.Tensor) -> torch.Tensor:
    """The last logits [rows, vocab] of a fresh forward over embeddings [rows, columns, hidden]."""
    ids = torch.full(embeddings.shape[:2], 2)
    with given_to_decoder(model, inputs_embeds=embeddings, **positions):
        return model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, -1]


@contextlib.contextmanager
def given_to_decoder(model: PreTrainedModel, **instead: Any) -> Iterator[None]:
    """Inside, the decoder of a model is given these arguments in place of what the model makes."""

    def put(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        return (), {**kwargs, **instead}

    handle = text_decoder(model).register_forward_pre_hook(put, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def text_decoder(model: PreTrainedModel) -> nn.Module:
    """The part that is given embeddings, with images in their places."""
    config = type(model.config.get_text_config(decoder=True))
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel) and part is not model]
    return next(part for part in parts if isinstance(part.config, config) and names_of_cache(part))


OF_COLUMNS = ("attention_mask", "token_type_ids", "mm_token_type_ids")


def longer(value: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
    """An argument of a prompt [rows, columns], for the text behind it too."""
    rest = torch.ones_like(stream) if bool(value[:, -1].all()) else torch.zeros_like(stream)
    return torch.cat((value, rest.to(value)), dim=1)


class Sight:
    """Which places of a text each forward sees, as the four rules say, where an image in the ring leaves whole.

    `floor` is where that begins which no image has taken with it, behind the sinks.

    Args:
        of_image: which tokens of the whole text belong to images.
        local: tokens that a sliding window of its own sees of the past, which must stay where it shares a mask.
    """

    def __init__(self, of_image: Sequence[bool], window_length: int, num_sink_tokens: int, local: int = 0):
        self.of_image, self.window, self.sinks = list(of_image), window_length, num_sink_tokens
        self.local = local
        self.floor = 0

    def visible(self, seen: int, new: int) -> list[int]:
        """Of a forward of `new` tokens after `seen` ones."""
        total, ring, sinks = seen + new, self.window - self.sinks, min(self.sinks, seen + new)
        if seen == 0:
            return list(range(total))
        if new > ring and total > self.window:
            return [*range(min(seen, sinks)), *range(seen, total)]
        first = max(self.floor, sinks, total - ring)
        if first < seen and self.of_image[first] and self.of_image[first - 1] and first > max(self.floor, sinks):
            begin = end = first
            while begin and self.of_image[begin - 1]:
                begin -= 1
            while end < seen and self.of_image[end]:
                end += 1
            if begin >= sinks and end - begin <= ring and sinks + seen - end >= min(seen, self.local):
                first = self.floor = end
        return [*range(sinks), *range(first, total)]


def visible(seen: int, new: int, window_length: int, num_sink_tokens: int) -> list[int]:
    """The places in a text without images that a forward of `new` tokens sees after `seen` ones, by the four rules."""
    return Sight([False] * (seen + new), window_length, num_sink_tokens).visible(seen, new)
