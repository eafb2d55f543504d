r"""A chat of known words as a chat template writes it: where its messages begin, in ids.

ChatML writes two messages like this; `start` and `words` of the second are 6 and 9:

    <|im_start|> user \n  hello  <|im_end|> \n  <|im_start|> assistant \n  hi  <|im_end|> \n
    0            1    2   3      4          5   6            7         8   9   10         11
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sink_patch.errors import SinkArgumentError
from sink_patch.generation.chat import common, ids_of, written

Ids = list[int]
BY_HAND = "Pass turn_start (and system_start) by hand, the token ids that begin a message."


@dataclass(frozen=True)
class Place:
    """Of one message: the index of the id with which it begins, and of the first of its words.

    Where the template writes nothing before the words that is not the end of the message before, both are the same.
    """

    start: int
    words: int


@dataclass(frozen=True)
class Probe:
    """One chat.

    Args:
        ids: of the text that the template writes.
        places: of the messages, in order.
        roles: of the messages.
    """

    ids: Ids
    places: Sequence[Place]
    roles: Sequence[str]

    def runs(self, role: str | None = None) -> list[Ids]:
        """What the template writes before the words of messages of a role (None: of all), but for the first message."""
        found = list(zip(self.places, self.roles, strict=True))[1:]
        runs = [self.ids[place.start : place.words] for place, its in found if role in (None, its)]
        return [run for run in runs if run]

    @classmethod
    def of(cls, tokenizer: Any, template: Mapping[str, Any], messages: Sequence[Mapping[str, str]]) -> Probe:
        """The probe of a chat whose contents differ.

        Raises:
            SinkArgumentError: the template cannot be applied, or does not write all contents, once and in order.
        """
        text = written(tokenizer, messages, template, BY_HAND)
        ids, places, end = ids_of(tokenizer, text), [], 0
        for number, message in enumerate(messages):
            begin = text.find(message["content"], end)
            if begin < 0 or text.count(message["content"]) != 1:
                raise SinkArgumentError(
                    f"The chat template of this {type(tokenizer).__name__} does not write the messages of a chat one "
                    f"after the other, each once ({message['role']} {number}). {BY_HAND}"
                )
            border = end + _end_of_last(tokenizer, template, messages[:number], text[end:begin])
            border = border if text[border:begin].strip() else begin  # spaces are no mark
            before = [common(ids, ids_of(tokenizer, text[:place])) for place in (border, begin)]
            places.append(Place(min(before), before[1]))
            end = begin + len(message["content"])
        return cls(ids, places, [message["role"] for message in messages])


def occurrences(ids: Ids, runs: Sequence[Ids]) -> list[int]:
    """Where one of the runs begins."""
    return [place for place in range(len(ids)) if any(ids[place : place + len(run)] == run for run in runs)]


def _end_of_last(tokenizer: Any, template: Mapping[str, Any], messages: Sequence[Mapping[str, str]], gap: str) -> int:
    """How many characters of what follows on the words of the last message are its end; 0 before the first one.

    That is what the template writes behind them where no message follows.
    """
    if not messages:
        return 0
    try:
        text = written(tokenizer, messages, template)
    except SinkArgumentError:  # it wants another message
        return 0
    words = messages[-1]["content"]
    return common(text[text.rfind(words) + len(words) :], gap) if words in text else 0
