"""What is not kept goes as it goes without `keep_streams`; what is returned is the caller's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import sink_patch
from sink_patch import SinkCache
from sink_patch.kept.prompts import TextPrompt, is_text_of_one_row
from tests.kept.talk import SINK, S, W, counted, llama
from tests.support.tiny import tokens

ASKED = {**SINK, "do_sample": False, "max_new_tokens": 6, "keep_streams": 8}


def embedded(model: Any) -> dict[str, Any]:
    return {"inputs_embeds": model.get_input_embeddings()(tokens(20)).detach()}


PLAIN: dict[str, dict[str, Any]] = {
    "two rows": {"inputs": tokens(20, rows=2)},
    "beams": {"num_beams": 2},
    "several answers": {"do_sample": True, "num_return_sequences": 2},
    "no streams": {"keep_streams": 0},
    "none asked": {"keep_streams": None},
}


@pytest.mark.parametrize("kind", PLAIN)
def test_the_plain_way(kind):
    model, texts = llama(), []
    for keep in (8, None):
        torch.manual_seed(0)
        texts.append(model.generate(**{"inputs": tokens(40), **ASKED, "keep_streams": keep, **PLAIN[kind]}))
        assert len(sink_patch.kept_streams) == 0
    assert torch.equal(*texts)


def test_embeddings_go_the_plain_way():
    model = llama()
    model.generate(**embedded(model), **ASKED)
    assert len(sink_patch.kept_streams) == 0


def test_a_cache_of_the_caller_is_used_and_never_kept():
    model = llama()
    model.generate(tokens(40), **ASKED)
    sink_patch.kept_streams.clear()
    cache = SinkCache(W, S, model=model)
    asked = {name: value for name, value in ASKED.items() if name != "cache_implementation"}
    text = model.generate(tokens(40), past_key_values=cache, **asked)
    assert len(sink_patch.kept_streams) == 0
    assert cache.get_seq_length() == text.shape[1] - 1


def test_an_assistant_keeps_nothing_of_its_own():
    model, assistant = llama(), copy.deepcopy(llama())
    no_end = {"eos_token_id": 500, "pad_token_id": 501}  # drafts need these in some versions
    text = model.generate(tokens(40), assistant_model=assistant, **no_end, **ASKED)
    assert [kept.tokens for kept in sink_patch.kept_streams] == [text.shape[1] - 1]
    sink_patch.kept_streams.clear(model)
    assert len(sink_patch.kept_streams) == 0


def test_arguments_of_a_models_own_go_the_plain_way():
    model = llama()
    types = torch.zeros_like(tokens(40))
    config = GenerationConfig()
    for given, is_text in (
        ({"token_type_ids": types}, True),
        ({"token_type_ids": types + 1}, False),
        ({"attention_mask": types, "position_ids": None, "use_cache": True}, True),
        ({"tone": types}, False),
        ({"output_router_logits": False, "tokenizer": "of transformers serve"}, True),
    ):
        assert is_text_of_one_row(model, tokens(40), config, given) is is_text


def test_padding_within_a_prompt_is_not_kept():
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    read = TextPrompt.read(torch.tensor([[0, 0, 5, 6, 7]]), mask)
    assert (list(read.text), read.padding) == ([5, 6, 7], 2)
    for other in ([[1, 0, 1, 1, 1]], [[0, 0, 0, 0, 0]], [[1, 1, 1]]):
        assert TextPrompt.read(torch.tensor([[0, 0, 5, 6, 7]]), torch.tensor(other)) is None


def test_what_is_returned_is_the_callers_own():
    model = llama()
    with counted(model) as forwards:
        out = model.generate(tokens(40), return_dict_in_generate=True, **ASKED)
        out.past_key_values.reset()  # and the kept one stays whole
        prompt = torch.cat((out.sequences, tokens(5)), dim=1)
        forwards.clear()
        found = model.generate(prompt, return_dict_in_generate=True, **ASKED)
        assert sum(forwards) == 6 + 5
    assert found.past_key_values.get_seq_length() == found.sequences.shape[1] - 1
    model.generate(tokens(70, seed=3), past_key_values=out.past_key_values, max_new_tokens=9)
    sink_patch.kept_streams.clear()
    first = model.generate(tokens(40), **ASKED)
    assert torch.equal(model.generate(torch.cat((first, tokens(5)), dim=1), **ASKED), found.sequences)
    cache = found.past_key_values  # goes on like any other
    more = model.generate(torch.cat((found.sequences, tokens(7)), dim=1), past_key_values=cache, max_new_tokens=5)
    assert more.shape[1] == found.sequences.shape[1] + 12


@pytest.mark.parametrize("where", ["the argument", "cache_config", "a passed config", "the model's own"])
def test_all_places_in_which_it_may_be_said(where):
    model, sizes = llama(), {"window_length": W, "num_sink_tokens": S, "keep_streams": 2}
    said: dict[str, Any] = {"cache_implementation": "sink", **sizes}
    if where != "the argument":
        said = {"cache_implementation": "sink", "cache_config": sizes}
    if where == "a passed config":
        said = {"generation_config": GenerationConfig(**said)}
    if where == "the model's own":
        model = copy.deepcopy(model)
        model.generation_config = GenerationConfig(**said)
        said = {}
    for seed in range(3):
        model.generate(tokens(40, seed=seed), max_new_tokens=4, do_sample=False, **said)
    assert len(sink_patch.kept_streams) == 2


@pytest.mark.parametrize("wrong", [-1, True, "8", 1.5])
def test_numbers_that_are_none(wrong):
    model = llama()
    model.generate(tokens(40), **ASKED)
    with pytest.raises(sink_patch.SinkArgumentError, match="keep_streams"):
        model.generate(tokens(40), **{**ASKED, "keep_streams": wrong})
    assert len(sink_patch.kept_streams) == 1
