"""The system part of a chat is counted as its chat template writes it, and kept as sinks."""

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

ONE_BY_ONE = (
    "{{ bos_token }}{% for m in messages %} word1 {{ m['role'] }} {{ m['content'] }} word2{% endfor %}"
    "{% if add_generation_prompt %} word1 assistant{% endif %}"
)
WANTS_A_USER = (
    "{% if messages[-1]['role'] == 'system' %}{{ raise_exception('No user.') }}{% endif %}" + ONE_BY_ONE
)  # what it says of a system message alone is not known, and it goes before the user's all the same
BEGINS_BY_ITSELF = (  # as Gemma 3 and Mistral have it: a system message alone is the beginning of a text, and no more
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + ' word3 ' %}"
    "{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %} word1 {{ (first if loop.first else '') + m['content'] }} word2{% endfor %}"
)
IN_THE_LAST_TURN = (  # as Mistral Nemo has it
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + ' word3 ' %}"
    "{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %} word1 {{ (first if loop.last else '') + m['content'] }} word2{% endfor %}"
)
THE_LAST_WINS = (
    "{{ bos_token }}{% set ns = namespace(said='') %}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{% set ns.said = m['content'] %}{% endif %}{% endfor %}{{ ' ' + ns.said }}"
    "{% for m in messages %}{% if m['role'] != 'system' %} word1 {{ m['content'] }} word2{% endif %}{% endfor %}"
)
ENDS_BY_ITSELF = ONE_BY_ONE + "{{ eos_token }}"  # as Phi 3 has it: the end of a system message alone is an end of text
IN_THE_FIRST_TURN = (  # as Gemma and Llama 2 have it
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + ' word3 ' %}"
    "{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% if not turns %}{{ raise_exception('No user.') }}{% endif %}"
    "{% for m in turns %} word1 {{ (first if loop.first else '') + m['content'] }} word2{% endfor %}"
)
MADE_UP = "{% if messages[0]['role'] != 'system' %}word1 system word10 word2{% endif %}" + ONE_BY_ONE
WITH_TOOLS = "{% for tool in tools or [] %}word9 word9 {% endfor %}" + ONE_BY_ONE

CASES = {
    # template: messages, and the text of the part that is to be kept
    "one by one": (ONE_BY_ONE, CHAT, "<s> word1 system word10 word11 word12 word2"),
    "a developer": (ONE_BY_ONE, [DEVELOPER, *CHAT[1:]], "<s> word1 developer word10 word11 word12 word2"),
    "several": (ONE_BY_ONE, [SYSTEM, *CHAT], "<s>" + 2 * " word1 system word10 word11 word12 word2"),
    "later ones are talk": (ONE_BY_ONE, [*CHAT, SYSTEM], "<s> word1 system word10 word11 word12 word2"),
    "nothing else": (ONE_BY_ONE, [SYSTEM], "<s> word1 system word10 word11 word12 word2"),
    "no user, no text": (WANTS_A_USER, CHAT, "<s> word1 system word10 word11 word12 word2 word1 user"),
    "in the first turn": (IN_THE_FIRST_TURN, CHAT, "<s> word1 word10 word11 word12 word3"),
    "in the first turn, after a beginning": (BEGINS_BY_ITSELF, CHAT, "<s> word1 word10 word11 word12 word3"),
    "in the last turn, which is the first": (IN_THE_LAST_TURN, CHAT[:2], "<s> word1 word10 word11 word12 word3"),
    "the last wins, and is the first": (THE_LAST_WINS, CHAT, "<s> word10 word11 word12"),
    "an end of text": (ENDS_BY_ITSELF, CHAT, "<s> word1 system word10 word11 word12 word2 word1 user"),
    "made up": (MADE_UP, CHAT[1:], "word1 system word10 word2 <s> word1 user"),
    "none at all": (ONE_BY_ONE, CHAT[1:], "<s> word1 user"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_instructions_are_counted_as_the_template_writes_them(case):
    template, messages, part = CASES[case]
    tokenizer = tiny_tokenizer(chat_template=template)
    before = copy.deepcopy(messages)
    wanted = len(tokenizer(part, add_special_tokens=False)["input_ids"])
    assert count_sink_tokens(tokenizer, messages) == wanted
    assert messages == before


def test_more_arguments_reach_the_template():
    tokenizer = tiny_tokenizer(chat_template=WITH_TOOLS)
    tools = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]
    assert count_sink_tokens(tokenizer, CHAT, tools=tools) == count_sink_tokens(tokenizer, CHAT) + 4
    assert count_sink_tokens(tokenizer, CHAT, chat_template=IN_THE_FIRST_TURN, add_generation_prompt=True) == 6


@pytest.mark.parametrize(
    ("messages", "template", "match"),
    [
        ([], ONE_BY_ONE, "No messages were given"),
        (CHAT, None, "cannot be applied"),
        (CHAT, IN_THE_LAST_TURN, "writes the instructions elsewhere than at the start"),
        (CHAT, "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}", "or leaves them out"),
        ([SYSTEM], BEGINS_BY_ITSELF, "or leaves them out"),
        ([*CHAT, {**SYSTEM, "content": "word40"}], THE_LAST_WINS, "elsewhere"),
        (CHAT, "{{ raise_exception('Roles must alternate.') }}", "Roles must alternate.*num_sink_tokens as a number"),
    ],
)
def test_what_cannot_be_counted(messages, template, match):
    with pytest.raises(SinkArgumentError, match=match):
        count_sink_tokens(tiny_tokenizer(chat_template=template), messages)


def test_what_was_counted_stays_while_the_rest_is_forgotten():
    model, tokenizer = tiny("llama", layers=1), tiny_tokenizer(chat_template=ONE_BY_ONE)
    kept = count_sink_tokens(tokenizer, CHAT)
    ids = torch.tensor([tokenizer.apply_chat_template(CHAT, return_dict=False)])
    asked = {"window_length": kept + 8, "num_sink_tokens": kept, "max_new_tokens": 40, "do_sample": False}
    out = model.generate(ids, cache_implementation="sink", return_dict_in_generate=True, **asked)
    other = ids.clone()
    other[0, kept - 1] += 1  # another last word of the instructions
    cache = sink_patch.SinkCache(kept + 8, kept, model=model)
    with torch.no_grad():
        model(other, past_key_values=cache)
        for token in out.sequences[0, other.shape[1] : -1]:
            model(token[None, None], past_key_values=cache)
    held, held_by_other = out.past_key_values.layers[0].values, cache.layers[0].values
    assert torch.equal(held[:, :, : kept - 1], held_by_other[:, :, : kept - 1])
    assert not torch.equal(held[:, :, kept - 1], held_by_other[:, :, kept - 1])
    assert torch.equal(held[:, :, kept:], held_by_other[:, :, kept:])
