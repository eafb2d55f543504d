"""What a model reads of a chat: messages as its chat template writes them, in ids."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import sink_patch
from sink_patch.arguments import Sizes
from sink_patch.errors import SinkArgumentError
from sink_patch.evaluate.chat.settings import Settings

Message = dict[str, str]
Ids = list[int]


class Template:
    """The chat template of a model; without one, a chat is lines of text.

    `turn_start` are the runs of ids that begin a message, none where that cannot be told; `told` says so to the user.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._has_one = tokenizer.chat_template is not None
        self.turn_start: list[Ids] = []
        self.told: str | None = None
        if not self._has_one:
            self.told = "This model has no chat template: what you type is text, and it goes on with it. The oldest "
            self.told += "tokens leave the window one by one."
            return
        try:
            self.turn_start = sink_patch.chat_settings(tokenizer)["turn_start"]
        except SinkArgumentError:
            self.told = "The chat template of this model does not tell where messages begin: the oldest tokens leave "
            self.told += "the window one by one, not whole messages."

    @property
    def digest(self) -> str:
        """By which a saved chat knows it."""
        return hashlib.sha256(repr(self._tokenizer.chat_template).encode()).hexdigest()

    def ids(self, messages: Sequence[Message], *, answering: bool) -> Ids:
        """Of a chat, from its first message on.

        Args:
            answering: whether an answer is to follow.

        Raises:
            SinkArgumentError: the template does not take these messages.
        """
        if not self._has_one:
            return list(self._tokenizer("".join(f"{message['content']}\n" for message in messages))["input_ids"])
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answering)
        except Exception as failure:  # templates are programs, and raise what they like
            raise SinkArgumentError(
                f"The chat template of this model does not take these messages: {failure} Say something else, or "
                "begin anew with /reset."
            ) from failure
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def sinks(self, system: Sequence[Message]) -> int:
        """How many tokens stay: the system prompt, and a few at least."""
        count = 0
        if self._has_one:
            count = sink_patch.count_sink_tokens(self._tokenizer, [*system, {"role": "user", "content": "a"}])
        elif system:
            count = len(self.ids(system, answering=False))
        return max(count, Sizes.num_sink_tokens)

    def check_room(self, settings: Settings) -> None:
        """Refuse a window that the system prompt fills.

        Raises:
            SinkArgumentError: it does; or the template takes no system prompt.
        """
        try:
            sinks = self.sinks(system_message(settings.system))
        except SinkArgumentError as failure:
            if settings.system is None:
                raise
            raise SinkArgumentError(
                "--system was given, and the chat template of this model takes no system prompt "
                f"({failure.__cause__ or failure}). Leave it out, and say it in your first message."
            ) from failure
        if sinks >= settings.window_length:
            raise SinkArgumentError(
                f"--window-length {settings.window_length} leaves no room for a talk: {sinks} tokens stay in the "
                f"window, the system prompt. Give {sinks + 1} or more, better some hundreds more, or a shorter prompt."
            )


def system_message(system: str | None) -> list[Message]:
    """The messages that a chat begins with."""
    return [] if system is None else [{"role": "system", "content": system}]


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids they have in common at their start."""
    both = min(len(one), len(other))
    if one[:both] == other[:both]:
        return both
    return next(place for place in range(both) if one[place] != other[place])
