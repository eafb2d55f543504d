"""What is read and asked in a stream, in token ids: parts of the text, and questions between them. No torch here.

A question never stays in the stream: it is asked of a copy of the cache. So it gives no answer away to a later one, all
distances are asked at the same places, and the stream is the same whatever is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Ids = tuple[int, ...]

INSIDE, EDGE, OUTSIDE = "inside", "edge", "outside"
"""Where a fact stands when the answer to its question is given: whole in the window, partly, or not at all."""


@dataclass(frozen=True)
class Question:
    """Something to ask, and the answers to choose from.

    Args:
        prompt: ids up to the answer.
        choices: ids of the answers, the right one first.
        group: what it is counted under: how far back the fact is, or a name.
        fact: where the fact stands in the stream: index of its first token, and of the one behind its last; None: it is
            in no part.
    """

    prompt: Ids
    choices: tuple[Ids, ...]
    group: int | str
    fact: tuple[int, int] | None = None

    def place(self, read: int, window_length: int, num_sink_tokens: int) -> str:
        """Where the fact stands, for the last token of the prompt, in a cache that has read so many tokens."""
        if self.fact is None:
            return OUTSIDE
        begin, end = self.fact
        tokens = read + len(self.prompt)
        oldest = tokens - window_length + num_sink_tokens if tokens > window_length else 0
        if begin >= oldest or end <= num_sink_tokens:
            return INSIDE
        return OUTSIDE if begin >= num_sink_tokens and end <= oldest else EDGE


@dataclass(frozen=True)
class Part:
    """Some tokens of the stream, which are read in one forward, and what is asked behind them."""

    ids: Ids
    questions: tuple[Question, ...] = ()


def beginning(tokenizer: Any) -> Ids:
    """The ids that the tokenizer writes before any text: the BOS token, or none."""
    return tuple(tokenizer("a")["input_ids"][:1]) if _writes_bos(tokenizer) else ()


def _writes_bos(tokenizer: Any) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][0] == bos


def following(tokenizer: Any, before: str, text: str) -> Ids:
    """The ids of `text` where it stands behind `before`: some tokenizers write the start of a text otherwise."""
    whole, head = (tokenizer(one, add_special_tokens=False)["input_ids"] for one in (before + text, before))
    return tuple(whole[_common(whole, head) :])


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids the two begin with alike."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def ask(
    tokenizer: Any, prompt: str, choices: Sequence[str], group: int | str, fact: tuple[int, int] | None
) -> Question:
    """A question behind the end of a line, in ids; the right choice comes first, each begins with its space."""
    return Question(
        following(tokenizer, "\n", prompt),
        tuple(following(tokenizer, prompt, choice) for choice in choices),
        group,
        fact,
    )
