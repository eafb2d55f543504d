"""How many tokens of a chat are its instructions: as sinks they stay, while the talk goes on and is forgotten."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from sink_patch.arguments import SYSTEM
from sink_patch.errors import SinkArgumentError

Message = Mapping[str, Any]

_INSTRUCTING = ("system", "developer")
_ANY_WORDS = ("a", "1")  # what somebody may say; the two have nothing in common


def count_sink_tokens(tokenizer: Any, messages: Sequence[Message], **template: Any) -> int:
    """Tokens at the start of a chat that are its instructions, to be kept as `num_sink_tokens`.

    Args:
        tokenizer: of the model, with a chat template (tokenization_utils_base.py, `apply_chat_template`); or its
            processor, which tells how many tokens images in the instructions have.
        messages: the chat, as for the chat template. Its instructions are the system (or developer) messages that it
            begins with, and what the template itself says before the first words of the user.
        template: more arguments of the chat template: `tools`, `chat_template`, variables of its own.

    Returns:
        Tokens up to the end of the system part. Where a template writes that into the first message of the user (Gemma,
        Llama 2), makes one up, or does not show where it ends, tokens up to the user's own words.

    Raises:
        SinkArgumentError: there are no messages, the chat template cannot be applied to them, or it does not write the
            instructions where sinks are, or there are images in them and no processor was given.
    """
    if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
        raise SinkArgumentError(
            f"{messages!r} was given as messages. Pass a list of messages, each a dict with role and content."
        )
    if not messages:
        raise SinkArgumentError("No messages were given. Pass the chat, with its system message first.")
    leading = list(itertools.takewhile(lambda message: message.get("role") in _INSTRUCTING, messages))
    other = _kinds_beside_text(leading)
    if other and tokenizer_of(tokenizer) is tokenizer:
        raise SinkArgumentError(
            f"The tokens of instructions with a part of type {other[0]!r} were to be counted, and how many tokens that "
            f"has, the processor alone can tell. Pass the processor instead of its tokenizer, or pass "
            f"num_sink_tokens={SYSTEM!r} to generate."
        )
    chat = _Chat(tokenizer, list(messages), template)
    part = chat.text[: chat.end_of_instructions()]
    # a token across the border belongs to what follows
    count = common(ids_of(tokenizer, chat.text), ids_of(tokenizer, part))
    return count + _more_of_media(tokenizer, leading, template) if other else count


def tokenizer_of(tokenizer: Any) -> Any:
    """The tokenizer of a processor, or what was given."""
    return getattr(tokenizer, "tokenizer", tokenizer)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text, with none that it does not hold; of an image there is one."""
    return list(tokenizer_of(tokenizer)(text, add_special_tokens=False)["input_ids"])


def _kinds_beside_text(messages: Sequence[Message]) -> list[str]:
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents if isinstance(content, (list, tuple)) for part in content]
    kinds = [str(part.get("type", "text")) for part in parts if isinstance(part, Mapping)]
    return [kind for kind in kinds if kind != "text"]


def _more_of_media(processor: Any, leading: Sequence[Message], template: Mapping[str, Any]) -> int:
    """How many ids a processor writes for the images of the instructions, more than the template writes words.

    Two chats that differ behind the instructions alone are the same up to there, in the ids of either.
    """
    chats = [[*leading, {"role": "user", "content": _like([], words)}] for words in _ANY_WORDS]
    asked = {**template, "tokenize": True, "return_dict": True, "add_generation_prompt": False}
    try:
        given = [processor.apply_chat_template(chat, **asked)["input_ids"] for chat in chats]
    except Exception as failure:  # it loads images, and templates are programs
        raise SinkArgumentError(
            f"This {type(processor).__name__} cannot process the instructions: {failure} Pass messages that it takes, "
            f"or num_sink_tokens={SYSTEM!r} to generate."
        ) from failure
    rows = [list(ids if isinstance(ids[0], int) else ids[0]) for ids in given]  # some return a batch of one
    return common(*rows) - common(*(ids_of(processor, written(processor, chat, template)) for chat in chats))


def _like(content: Any, words: str) -> Any:
    """Words as the content of a message: in parts, where it had parts."""
    return [{"type": "text", "text": words}] if isinstance(content, (list, tuple)) else words


class _Chat:
    """A chat as its template writes it. Places are counted in characters."""

    def __init__(self, tokenizer: Any, messages: list[Message], template: Mapping[str, Any]):
        self._tokenizer, self._messages, self._template = tokenizer, messages, template
        self._leading = len(list(itertools.takewhile(lambda message: message.get("role") in _INSTRUCTING, messages)))
        self.text = self._written(messages)

    def end_of_instructions(self) -> int:
        """Where the part that is to be kept ends; with the last of the instructions in it."""
        if self._leading == 0:
            return self._where_words_begin(0, self._messages)
        end = self._end_of_leading()
        if self._where_words_begin(self._leading - 1, self._messages) >= end:
            raise SinkArgumentError(
                f"The chat template of this {type(self._tokenizer).__name__} writes the instructions elsewhere than at "
                "the start of the chat, or leaves them out, so they cannot be sinks. Put them into the first message "
                "of the user, or pass num_sink_tokens as a number."
            )
        return end

    def _end_of_leading(self) -> int:
        leading = self._messages[: self._leading]
        if leading == self._messages:
            return len(self.text)
        try:
            alone = self._written(leading)
            said = self._where_words_begin(self._leading - 1, leading) < len(alone)
        except SinkArgumentError:  # many templates want a message of the user
            said = False
        if said and self.text.startswith(alone):
            return len(alone)
        return self._where_words_begin(self._leading, self._messages[: self._leading + 1])

    def _where_words_begin(self, index: int, messages: list[Message]) -> int:
        """How far a text is the same, whatever message `index` says; all of it if that is not in it."""
        others = [
            [
                *messages[:index],
                {**messages[index], "content": _like(messages[index].get("content"), words)},
                *messages[index + 1 :],
            ]
            for words in _ANY_WORDS
        ]
        return common(*map(self._written, others))

    def _written(self, messages: list[Message]) -> str:
        return written(self._tokenizer, messages, self._template)


def written(
    tokenizer: Any,
    messages: Sequence[Message],
    template: Mapping[str, Any],
    instead: str = "Pass messages that it takes, or num_sink_tokens as a number.",
) -> str:
    """Messages as the chat template writes them.

    Args:
        template: more arguments of it.
        instead: what to do if it fails.

    Raises:
        SinkArgumentError: it cannot be applied to them.
    """
    asked = {**template, "tokenize": False, "add_generation_prompt": False, "continue_final_message": False}
    try:
        text: str = tokenizer.apply_chat_template(list(messages), **asked)
    except Exception as failure:  # templates are programs, and raise what they like
        raise SinkArgumentError(
            f"The chat template of this {type(tokenizer).__name__} cannot be applied to the messages: {failure} "
            f"{instead}"
        ) from failure
    return text


def common(*sequences: Sequence[Any]) -> int:
    """How many items they have in common at their start."""
    differ = (place for place, items in enumerate(zip(*sequences, strict=False)) if len(set(items)) > 1)
    return next(differ, min(map(len, sequences)))
