"""How many tokens of a chat are its instructions: as sinks they stay, while the talk goes on and is forgotten."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from sink_patch.errors import SinkArgumentError

Message = Mapping[str, Any]

_INSTRUCTING = ("system", "developer")
_ANY_WORDS = ("a", "1")  # what a user may say; the two have nothing in common


def count_sink_tokens(tokenizer: Any, messages: Sequence[Message], **template: Any) -> int:
    """Tokens at the start of a chat that are its instructions, to be kept as `num_sink_tokens`.

    Args:
        tokenizer: of the model, with a chat template (tokenization_utils_base.py, `apply_chat_template`).
        messages: the chat, as for the chat template. Its instructions are the system (or developer) messages that it
            begins with, and what the template itself says before the first words of the user.
        template: more arguments of the chat template: `tools`, `chat_template`, variables of its own.

    Returns:
        Tokens up to the end of the system part. Where a template writes that into the first message of the user (Gemma,
        Llama 2), or makes one up, tokens up to the user's own words.

    Raises:
        SinkArgumentError: there are no messages, or the chat template cannot be applied to them.
    """
    if not messages:
        raise SinkArgumentError("No messages were given. Pass the chat, with its system message first.")
    whole = _text(tokenizer, messages, template)
    ids, ids_of_part = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in (whole, whole[: _length(tokenizer, messages, whole, template)])
    )
    return _common(ids, ids_of_part)  # a token across the border belongs to what follows


def _length(tokenizer: Any, messages: Sequence[Message], whole: str, template: Mapping[str, Any]) -> int:
    """Characters of the chat as text that are its instructions."""
    leading = list(itertools.takewhile(lambda message: message.get("role") in _INSTRUCTING, messages))
    if len(leading) == len(messages):
        return len(whole)
    try:
        alone = _text(tokenizer, leading, template)
    except SinkArgumentError:  # many templates want a message of the user
        alone = ""
    if leading and alone and whole.startswith(alone):
        return len(alone)
    first = messages[len(leading)]
    others = [_text(tokenizer, [*leading, {**first, "content": words}], template) for words in _ANY_WORDS]
    return _common(whole, *others)


def _text(tokenizer: Any, messages: Sequence[Message], template: Mapping[str, Any]) -> str:
    chat = {**template, "tokenize": False, "add_generation_prompt": False, "continue_final_message": False}
    try:
        text: str = tokenizer.apply_chat_template(list(messages), **chat)
    except Exception as failure:  # templates are programs, and raise what they like
        raise SinkArgumentError(
            f"The chat template of this {type(tokenizer).__name__} cannot be applied to the messages: {failure} Pass "
            "messages that it takes, or num_sink_tokens as a number."
        ) from failure
    return text


def _common(*sequences: Sequence[Any]) -> int:
    """How many items they have in common at their start."""
    differ = (place for place, items in enumerate(zip(*sequences, strict=False)) if len(set(items)) > 1)
    return next(differ, min(map(len, sequences)))
