"""The tokens of a chat's system message are counted as its chat template writes them, and kept as sinks."""

from __future__ import annotations

import copy

import pytest
import torch

import sink_patch
from sink_patch import SinkArgumentError, count_sink_tokens
from tests.support.tiny import tiny
from tests.support.tokenizer import tiny_tokenizer

SYSTEM = {"role": "system", "content": "word10 word11 word12"}
DEVELOPER = {**SYSTEM, "role": "developer"}
USER = {"role": "user", "content": "word20 word21"}
ANSWER = {"role": "assistant", "content": "word30"}
CHAT = [SYSTEM, USER, ANSWER, {"role": "user", "content": "word22"}]

MESSAGE_BY_MESSAGE = (
    "{{ bos_token }}{% for m in messages %} word1 {{ m['role'] }} {{ m['content'] }} word2{% endfor %}"
    "{% if add_generation_prompt %} word1 assistant{% endif %}"
)
# it fails for a system message alone, and writes it before the user's
NEEDS_A_USER = (
    "{% if messages[-1]['role'] == 'system' %}{{ raise_exception('No user.') }}{% endif %}" + MESSAGE_BY_MESSAGE
)
BEGINS_WITHOUT_MESSAGES = (  # as in Gemma 3 and Mistral: a system message alone gives only the beginning of a text
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + ' word3 ' %}"
    "{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %} word1 {{ (first if loop.first else '') + m['content'] }} word2{% endfor %}"
)
IN_THE_LAST_TURN = (  # as in Mistral Nemo
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + ' word3 ' %}"
    "{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %} word1 {{ (first if loop.last else '') + m['content'] }} word2{% endfor %}"
)
ONLY_THE_LAST = (
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{% set ns.system = m['content'] %}{% endif %}{% endfor %}{{ ' ' + ns.system }}"
    "{% for m in messages %}{% if m['role'] != 'system' %} word1 {{ m['content'] }} word2{% endif %}{% endfor %}"
)
# as in Phi 3: after a system message alone it writes an end of text
ENDS_WITH_EOS = MESSAGE_BY_MESSAGE + "{{ eos_token }}"
IN_THE_FIRST_TURN = (  # as in Gemma and Llama 2
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + ' word3 ' %}"
    "{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% if not turns %}{{ raise_exception('No user.') }}{% endif %}"
    "{% for m in turns %} word1 {{ (first if loop.first else '') + m['content'] }} word2{% endfor %}"
)
DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}word1 system word10 word2{% endif %}" + MESSAGE_BY_MESSAGE
WITH_TOOLS = "{% for tool in tools or [] %}word9 word9 {% endfor %}" + MESSAGE_BY_MESSAGE

CASES = {
    # name: template, messages, and the part of the text that is to be kept
    "message by message": (MESSAGE_BY_MESSAGE, CHAT, "<s> word1 system word10 word11 word12 word2"),
    "a developer": (MESSAGE_BY_MESSAGE, [DEVELOPER, *CHAT[1:]], "<s> word1 developer word10 word11 word12 word2"),
    "several": (MESSAGE_BY_MESSAGE, [SYSTEM, *CHAT], "<s>" + 2 * " word1 system word10 word11 word12 word2"),
    "a later system message": (MESSAGE_BY_MESSAGE, [*CHAT, SYSTEM], "<s> word1 system word10 word11 word12 word2"),
    "a system message alone": (MESSAGE_BY_MESSAGE, [SYSTEM], "<s> word1 system word10 word11 word12 word2"),
    "no user, no text": (NEEDS_A_USER, CHAT, "<s> word1 system word10 word11 word12 word2 word1 user"),
    "in the first turn": (IN_THE_FIRST_TURN, CHAT, "<s> word1 word10 word11 word12 word3"),
    "in the first turn, after a beginning": (BEGINS_WITHOUT_MESSAGES, CHAT, "<s> word1 word10 word11 word12 word3"),
    "in the last turn, which is the first": (IN_THE_LAST_TURN, CHAT[:2], "<s> word1 word10 word11 word12 word3"),
    "only the last, which is the first": (ONLY_THE_LAST, CHAT, "<s> word10 word11 word12"),
    "an end of text": (ENDS_WITH_EOS, CHAT, "<s> word1 system word10 word11 word12 word2 word1 user"),
    "a default of the template": (DEFAULT_SYSTEM, CHAT[1:], "word1 system word10 word2 <s> word1 user"),
    "no system message": (MESSAGE_BY_MESSAGE, CHAT[1:], "<s> word1 user"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_system_message_is_counted_as_the_template_writes_it(case):
    template, messages, part = CASES[case]
    tokenizer = tiny_tokenizer(chat_template=template)
    before = copy.deepcopy(messages)
    wanted = len(tokenizer(part, add_special_tokens=False)["input_ids"])
    assert count_sink_tokens(tokenizer, messages) == wanted
    assert messages == before


def test_other_arguments_are_passed_to_the_template():
    tokenizer = tiny_tokenizer(chat_template=WITH_TOOLS)
    tools = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]
    assert count_sink_tokens(tokenizer, CHAT, tools=tools) == count_sink_tokens(tokenizer, CHAT) + 4
    assert count_sink_tokens(tokenizer, CHAT, chat_template=IN_THE_FIRST_TURN, add_generation_prompt=True) == 6


@pytest.mark.parametrize(
    ("messages", "template", "match"),
    [
        ([], MESSAGE_BY_MESSAGE, "No messages were given"),
        ("w5 w6", MESSAGE_BY_MESSAGE, "each a dict with role and content"),
        (["w5 w6"], MESSAGE_BY_MESSAGE, "each a dict with role and content"),
        (3, MESSAGE_BY_MESSAGE, "each a dict with role and content"),
        (CHAT, None, "cannot be applied"),
        (CHAT, IN_THE_LAST_TURN, "writes the instructions elsewhere than at the start"),
        (CHAT, "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}", "or leaves them out"),
        ([SYSTEM], BEGINS_WITHOUT_MESSAGES, "or leaves them out"),
        ([*CHAT, {**SYSTEM, "content": "word40"}], ONLY_THE_LAST, "elsewhere"),
        (CHAT, "{{ raise_exception('Roles must alternate.') }}", "Roles must alternate.*num_sink_tokens as a number"),
    ],
)
def test_messages_that_cannot_be_counted_are_refused(messages, template, match):
    with pytest.raises(SinkArgumentError, match=match):
        count_sink_tokens(tiny_tokenizer(chat_template=template), messages)


def test_the_counted_tokens_stay_in_the_window():
    model, tokenizer = tiny("llama", layers=1), tiny_tokenizer(chat_template=MESSAGE_BY_MESSAGE)
    kept = count_sink_tokens(tokenizer, CHAT)
    ids = torch.tensor([tokenizer.apply_chat_template(CHAT, return_dict=False)])
    asked = {"window_length": kept + 8, "num_sink_tokens": kept, "max_new_tokens": 40, "do_sample": False}
    out = model.generate(ids, cache_implementation="sink", return_dict_in_generate=True, **asked)
    other = ids.clone()
    other[0, kept - 1] += 1  # another last word of the system message
    cache = sink_patch.SinkCache(kept + 8, kept, model=model)
    with torch.no_grad():
        model(other, past_key_values=cache)
        for token in out.sequences[0, other.shape[1] : -1]:
            model(token[None, None], past_key_values=cache)
    held, held_by_other = out.past_key_values.layers[0].values, cache.layers[0].values
    assert torch.equal(held[:, :, : kept - 1], held_by_other[:, :, : kept - 1])
    assert not torch.equal(held[:, :, kept - 1], held_by_other[:, :, kept - 1])
    assert torch.equal(held[:, :, kept:], held_by_other[:, :, kept:])


def test_an_image_in_the_instructions_is_not_counted_as_one_token():
    image = {"role": "system", "content": [{"type": "text", "text": "word10"}, {"type": "image"}]}
    with pytest.raises(SinkArgumentError, match="a part of type 'image' were to be counted"):
        count_sink_tokens(tiny_tokenizer(chat_template=MESSAGE_BY_MESSAGE), [image, USER])
    user = {"role": "user", "content": image["content"]}
    assert count_sink_tokens(tiny_tokenizer(chat_template=MESSAGE_BY_MESSAGE), [SYSTEM, user]) == 7
