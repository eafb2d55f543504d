"""What a call of `generate` can be: how it decodes, how its prompt comes, where its cache comes from, a second turn."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

DECODING: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
    "assistant": {"do_sample": False},
}
PROMPT = {"short": 5, "past the window": 30, "up to the context": 58, "past the context": 90}
"""Columns of a prompt."""
WINDOW, SINKS, CONTEXT = 12, 3, 64
CHUNK = 4


@dataclass(frozen=True)
class Call:
    """One or two calls of `generate` over one cache.

    Args:
        decoding: one of `DECODING`.
        prompt: one of `PROMPT`.
        feeding: "ids", "pieces" (a `prefill_chunk_size`) or "embeds".
        rows: "one", or "padded": two rows, the second of them padded to the left.
        cache: "made" by `generate`, or "given".
        second_turn: "none", by the whole "history", by the "new tokens" alone with a mask over all, or by the history
            after the cache was "saved" and loaded.
        window: "small", which the text leaves behind, or "large", where it is that of the default cache.
    """

    decoding: str = "greedy"
    prompt: str = "short"
    feeding: str = "ids"
    rows: str = "one"
    cache: str = "made"
    second_turn: str = "none"
    window: str = "small"

    def __str__(self) -> str:
        """What differs from the plain call."""
        unlike = [getattr(self, field.name) for field in fields(self) if getattr(self, field.name) != field.default]
        return ", ".join(unlike) or "plain"

    @property
    def window_length(self) -> int:
        return WINDOW if self.window == "small" else 256


CHOICES = {
    "decoding": tuple(DECODING),
    "prompt": tuple(PROMPT),
    "feeding": ("ids", "pieces", "embeds"),
    "rows": ("one", "padded"),
    "cache": ("made", "given"),
    "second_turn": ("none", "history", "new tokens", "saved"),
    "window": ("small", "small", "large"),
}


def single_changes() -> Iterator[Call]:
    """The plain call, and all that differ from it in one thing."""
    yield Call()
    for name, values in CHOICES.items():
        for value in dict.fromkeys(values):
            if value != getattr(Call(), name):
                yield Call(**{name: value})


def at_random(seed: int) -> Iterator[Call]:
    """Calls that differ in many things, without end."""
    chance = random.Random(seed)
    while True:
        call = Call(**{name: chance.choice(values) for name, values in CHOICES.items()})
        if is_a_call(call):
            yield call


def is_a_call(call: Call) -> bool:
    """Whether transformers knows such a call at all."""
    drafts = call.decoding in ("prompt lookup", "assistant")
    if drafts and (call.rows != "one" or call.feeding == "embeds" or call.second_turn == "new tokens"):
        return False
    if call.feeding == "embeds" and call.second_turn != "none":
        return False  # the second turn would have to be embeddings of the whole history
    return not (call.decoding == "beams" and call.second_turn != "none")  # its cache has a row for each beam


def calls(seed: int, count: int) -> list[Call]:
    """All single changes, then some at random."""
    return [*single_changes(), *itertools.islice(at_random(seed), count)]
