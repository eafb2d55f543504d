"""A long chat in which the user says facts and asks for them later, and the system message holds one for good."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sink_patch
from sink_patch.errors import SinkArgumentError
from sink_patch.evaluate.recall.scripts.lines import CHOICES, ENOUGH, Line, lines
from sink_patch.evaluate.recall.scripts.script import Ids, Part, Question, following
from sink_patch.evaluate.recall.scripts.words import WORDS, short

SYSTEM = "system message"
"""The group of the questions about the system message, in which a fact stands for good."""
_KEPT = "Zoe mayor Berne"


@dataclass(frozen=True)
class Plan:
    """What is said and asked.

    Args:
        messages: how many messages the chat has behind the system message, those of both sides counted.
        distances: how many messages back the facts are that are asked for.
        every: after every so many messages there are questions.
        seed: of the choice of words.

    Raises:
        SinkArgumentError: nothing would be asked.
    """

    messages: int = 200
    distances: tuple[int, ...] = (2, 4, 8, 12, 16, 24, 32, 64)
    every: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.every < 2 or self.every % 2:
            raise SinkArgumentError(
                f"every={self.every}: give how many messages stand between two questions, 2, 4, ..."
            )
        if not self.distances or min(self.distances) < 2 or any(distance % 2 for distance in self.distances):
            raise SinkArgumentError(
                f"distance={','.join(map(str, self.distances))}: each fact is answered by the assistant, so "
                "give even numbers of messages, 2 or more."
            )
        if self.messages < max(self.every, 2 * ENOUGH, min(self.distances)):
            raise SinkArgumentError(f"messages={self.messages}: nothing would be asked. Ask for more.")


class Chat:
    """A chat as the template of a tokenizer writes it, message by message, without end.

    Args:
        tokenizer: with a chat template that writes old messages as it wrote them when they were new.
        system: the system message.

    Raises:
        SinkArgumentError: there is no chat template, or it writes old messages anew.
    """

    def __init__(self, tokenizer: Any, system: str):
        if getattr(tokenizer, "chat_template", None) is None:
            raise SinkArgumentError(
                "The tokenizer of this model has no chat template, so there is no chat to recall. Give a model that "
                "was trained on chats; `sink-patch eval streameval` takes any model."
            )
        self._tokenizer = tokenizer
        self._before = [{"role": "system", "content": system}, *self._turn("Hello.", "Hello!")]
        self._text = self._written(self._before)
        self.num_sink_tokens = sink_patch.count_sink_tokens(tokenizer, self._before)

    @property
    def opening(self) -> Ids:
        """The ids of the system message and of the greeting behind it."""
        return tuple(self._tokenizer(self._text, add_special_tokens=False)["input_ids"])

    def turn(self, user: str, assistant: str) -> Ids:
        """The ids of a message of the user and its answer, somewhere in the chat."""
        return self._behind(self._written([*self._before, *self._turn(user, assistant)]))

    def question(self, user: str, answer: str) -> str:
        """The text of a message of the user, and the beginning of its answer."""
        asked = [*self._before, {"role": "user", "content": user}]
        return self._rest(self._written(asked, add_generation_prompt=True)) + answer

    def ids(self, text: str) -> Ids:
        return following(self._tokenizer, self._text, text)

    def _behind(self, text: str) -> Ids:
        return self.ids(self._rest(text))

    def _rest(self, text: str) -> str:
        if not text.startswith(self._text):
            raise SinkArgumentError(
                "The chat template of this model writes old messages anew when others follow, so no stream goes on in "
                "it. Use `sink-patch eval streameval`, which needs no template."
            )
        return text[len(self._text) :]

    def _written(self, messages: Sequence[dict[str, str]], **options: Any) -> str:
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **options))
        except Exception as failure:  # a template raises what it likes
            raise SinkArgumentError(f"The chat template of this model takes no such chat: {failure}.") from failure

    @staticmethod
    def _turn(user: str, assistant: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def parts(tokenizer: Any, plan: Plan) -> tuple[list[Part], int]:
    """The chat in ids, and how many tokens its system message has: each fact and its answer are a part.

    Raises:
        SinkArgumentError: as for `Chat`.
    """
    kept, *words = short(tokenizer, "Anna baker Paris =", WORDS)
    system = Line(_KEPT, kept)
    chat = Chat(tokenizer, f"You are a helpful assistant, and keep a list of words. {system.text.strip()}")
    said: list[Line] = []
    places: list[tuple[int, int]] = []
    found, read = [Part(chat.opening)], len(chat.opening)
    for line in itertools.islice(lines(plan.seed, words), plan.messages // 2):
        said.append(line)
        ids = chat.turn(line.text.strip(), "OK.")
        places.append((read, read + len(ids)))
        read += len(ids)
        asked: list[Question] = []
        if 2 * len(said) % plan.every == 0 and len(said) >= ENOUGH:
            back = [distance for distance in plan.distances if distance <= 2 * len(said)]
            asked = [_question(chat, said, len(said) - one // 2, one, places[len(said) - one // 2]) for one in back]
            asked.append(_question(chat, [*said, system], len(said), SYSTEM, (0, chat.num_sink_tokens)))
        found.append(Part(ids, tuple(asked)))
    return found, chat.num_sink_tokens


def _question(chat: Chat, said: Sequence[Line], asked: int, group: int | str, fact: tuple[int, int]) -> Question:
    """About one of the lines, behind two of the newest that are read again, as in `lines`."""
    again = [number for number in (len(said) - 2, len(said) - 4) if number != asked and number >= 0]
    nearest = sorted(range(len(said)), key=lambda number: (abs(number - asked), number))
    others = [number for number in nearest if number != asked and number not in again][: CHOICES - 1]
    prompt = chat.question(
        "Now read them again.", "".join(said[number].text for number in again) + said[asked].key + " ="
    )
    choices = [f" {said[number].word}" for number in (asked, *others)]
    ids = tuple(chat.ids(prompt))
    return Question(ids, tuple(chat.ids(prompt + choice)[len(ids) :] for choice in choices), group, fact)
