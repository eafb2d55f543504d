"""The ids that begin messages are found in what a chat template writes."""

from __future__ import annotations

import re

import pytest

import sink_patch
from sink_patch import SinkArgumentError, chat_settings
from sink_patch.arguments import Settings
from tests.support.templates import STYLES, byte_level
from tests.support.tokenizer import tiny_tokenizer

SYSTEM = {"role": "system", "content": "Be brief.\n\nBe kind."}
TALK = [
    {"role": role, "content": f"Some words, number {number}:\n\n* {word} *"}
    for number, (role, word) in enumerate(zip(["user", "assistant"] * 4, "abcdefgh", strict=True))
]


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("style", STYLES)
def test_templates_like_those_of_known_models(style):
    tokenizer, wanted = byte_level(STYLES[style].template), STYLES[style]
    found = chat_settings(tokenizer)
    assert sorted(map(tokenizer.decode, found["turn_start"])) == sorted(wanted.turns)
    assert [tokenizer.decode(run) for run in found.get("system_start", [])] == (
        [wanted.system] if wanted.system else []
    )


@pytest.mark.parametrize("style", STYLES)
def test_a_message_begins_where_they_are_and_nowhere_else(style):
    """In another chat than those from which they were found, by the text alone."""
    tokenizer = byte_level(STYLES[style].template)
    turn_start = chat_settings(tokenizer)["turn_start"]
    text = tokenizer.apply_chat_template(TALK, tokenize=False)
    written = ids(tokenizer, text)
    count = sum(written[at : at + len(run)] == run for at in range(len(written)) for run in turn_start)
    own = len(re.findall("You help|Today", text))  # system messages of the template
    assert count - own in (len(TALK), len(TALK) // 2), "each message, or each of the user"
    for message in TALK[:: 1 if count - own == len(TALK) else 2]:
        before = ids(tokenizer, text[: text.index(message["content"])])
        assert any(before[len(before) - length :][: len(run)] == run for run in turn_start for length in range(40))


@pytest.mark.parametrize("style", [name for name, style in STYLES.items() if style.system])
def test_a_system_message_begins_so_and_nothing_else_does(style):
    tokenizer = byte_level(STYLES[style].template)
    (start,) = chat_settings(tokenizer)["system_start"]
    with_system, without = (
        ids(tokenizer, tokenizer.apply_chat_template(chat, tokenize=False)) for chat in ([SYSTEM, *TALK], TALK)
    )
    assert with_system[: len(start)] == start
    has_one = style in ("a default system message", "Llama 3.1")
    assert (without[: len(start)] == start) == has_one


def test_they_are_settings_of_a_cache():
    found = chat_settings(byte_level(STYLES["ChatML"].template))
    settings = Settings(window_length=64, num_sink_tokens="system", evict="turns", **found)
    assert settings.turn_start == ((258,),)
    assert settings.system_start == ((258, ord("s")),)


def test_arguments_of_the_template():
    tokenizer = byte_level(STYLES["ChatML"].template)
    assert chat_settings(tokenizer, chat_template=STYLES["Gemma"].template) == {"turn_start": [[263]]}
    named = "{% for m in messages %}{{ mark }}{{ m.content }}<|end|>{% endfor %}"
    assert chat_settings(tokenizer, chat_template=named, mark="<|user|>")["turn_start"] == [[265]]


UNMARKED = {
    "words alone": "{% for m in messages %}{{ m.content }}\n{% endfor %}",
    "the mark is an end": "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}",
    "a mark that texts have too": "{% for m in messages %}\n- {{ m.content }}{% endfor %}",
}


@pytest.mark.parametrize("case", UNMARKED)
def test_messages_without_a_beginning(case):
    with pytest.raises(SinkArgumentError, match=r"cannot be told apart. Pass turn_start"):
        chat_settings(byte_level(UNMARKED[case]))


@pytest.mark.parametrize(
    ("template", "match"),
    [
        (None, "cannot be applied.*Pass turn_start"),
        ("{{ raise_exception('no chats') }}", "no chats Pass turn_start"),
        ("{{ messages[-1].content }}", "does not write the messages"),
        ("{% for m in messages | reverse %}<|user|>{{ m.content }}{% endfor %}", "does not write the messages"),
        ("{% for m in messages %}<|user|>{{ m.content }}{{ m.content }}{% endfor %}", "each once"),
    ],
)
def test_templates_that_cannot_be_read(template, match):
    with pytest.raises(SinkArgumentError, match=match):
        chat_settings(byte_level(template))


def test_words_that_a_tokenizer_does_not_know():
    """All contents are <unk> to it."""
    named = "{{ {'user': 'word3'}.get(m.role, 'word4') }}"
    template = "{% for m in messages %} word1 " + named + " {{ m.content }} word2{% endfor %}"
    assert sink_patch.chat_settings(tiny_tokenizer(chat_template=template))["turn_start"] == [[4]]
