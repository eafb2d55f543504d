"""Talks with images and `keep_streams`: what the decoder and the encoder have seen, and the same forwards by hand."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from sink_patch import SinkCache
from sink_patch.models.entries import decoder_of
from sink_patch.models.families.media import MEDIA
from tests.models.test_media_talks import ANSWER, MARKS, given
from tests.support import media
from tests.support.replay import cache_name

ENCODERS = ("vision_tower", "visual", "vision_model", "audio_tower", "embed_vision")
NEW = ANSWER["max_new_tokens"]
Image = dict[str, Any]
Call = tuple[torch.Tensor, Sequence[Image], list[int]]
"""The prompt of a call, ids [1, columns], all its images, and the columns of its forwards."""


@dataclass
class Seen:
    """What one call has read: columns of each forward of the decoder, and numbers that encoders were given."""

    forwards: list[int] = field(default_factory=list)
    numbers: int = 0

    def clear(self) -> None:
        self.forwards.clear()
        self.numbers = 0


@contextlib.contextmanager
def watched(model: PreTrainedModel) -> Iterator[Seen]:
    seen = Seen()

    def read(_module: Any, args: Any, kwargs: Any) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        seen.forwards.append(states.shape[1])

    def look(_module: Any, args: Any, kwargs: Any) -> None:
        seen.numbers += next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)).numel()

    parts = [part for name, part in model.named_modules() if name.rpartition(".")[2] in ENCODERS]
    hooks = [decoder_of(model).layers[0].register_forward_pre_hook(read, with_kwargs=True)]
    hooks.append(parts[0].register_forward_pre_hook(look, with_kwargs=True))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def by_hand(model: PreTrainedModel, calls: Sequence[Call], window: int, sinks: int) -> torch.Tensor:
    """The logits of the last call, [1, new tokens, vocab]: its forwards, and those before, over one fresh cache."""
    cache, name = SinkCache(window, sinks, model=model), cache_name(model)
    each = len(media.SAMPLES[model.config.model_type].ids(media.TOKEN)) or 1
    found: list[torch.Tensor] = []
    for prompt, images, forwards in calls:
        text, found = prompt, []
        for columns in forwards:
            start = cache.get_seq_length()
            piece, before = text[:, start : start + columns], int((text[:, :start] == media.TOKEN).sum())
            per = int((text == media.TOKEN).sum()) // len(images) if images else each
            first, count = before // max(per, 1), int((piece == media.TOKEN).sum()) // max(per, 1)
            inputs = given(model, piece, list(images[first : first + count]), start + columns)
            logits = model(**inputs, **{name: cache}).logits[:, -1:]
            if start + columns == text.shape[1]:
                found.append(logits)
                allowed = logits[:, -1].clone()
                allowed[:, MARKS] = -torch.inf
                text = torch.cat((text, allowed.argmax(-1, keepdim=True)), dim=1)
    return torch.cat(found, dim=1)


@dataclass
class Talk:
    """One talk with images.

    Args:
        model: watched by `seen`.
        asked: sizes of the cache.
        calls: those that went on in each other.
    """

    model: PreTrainedModel
    seen: Seen
    asked: dict[str, Any]
    calls: list[Call] = field(default_factory=list)
    known: int = 0

    def ask(self, ids: torch.Tensor, images: Sequence[Image], **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The text after a prompt, and its logits [1, new tokens, vocab]; `known` columns were not read."""
        self.seen.clear()
        sink = {"cache_implementation": "sink", "keep_streams": 4, **self.asked}
        out = self.model.generate(**given(self.model, ids, list(images), ids.shape[1]), **ANSWER, **sink, **more)
        read = sum(self.seen.forwards) - (NEW - 1)
        self.known = ids.shape[1] - read
        self.calls = [*_cut(self.calls, self.known), (ids, tuple(images), list(self.seen.forwards))]
        return out.sequences, torch.stack(out.logits, dim=1)

    def wanted(self) -> torch.Tensor:
        return by_hand(self.model, self.calls, self.asked["window_length"], self.asked["num_sink_tokens"])

    def images_seen(self) -> float:
        """How many images encoders have seen in the last call."""
        one = media.images(self.model, 1)
        name = next(name for name in one if name in MEDIA[self.model.config.model_type].inputs)
        return self.seen.numbers / one[name].numel()


def _cut(calls: Sequence[Call], known: int) -> list[Call]:
    """The forwards that read the first tokens, so many."""
    cut, seen = [], 0
    for text, images, forwards in calls:
        kept = []
        for columns in forwards:
            if seen < known:
                kept.append(columns)
                seen += columns
        if kept:
            cut.append((text, images, kept))
    assert seen == known, f"no forward has ended behind {known} tokens"
    return cut
