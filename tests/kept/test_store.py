"""What is kept is bounded in bytes and in number, is shown, and is forgotten."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch

import sink_patch
from tests.kept.talk import SINK, S, W, counted, llama
from tests.support.tiny import tokens

ASKED = {**SINK, "do_sample": False, "max_new_tokens": 6, "keep_streams": 8}
LAYERS, HEADS, DIM, FLOAT = 2, 2, 16, 4
SLOTS = LAYERS * HEADS * 2 * DIM * FLOAT  # bytes of a token
SINKS = LAYERS * HEADS * S * DIM * FLOAT  # the pristine ones, keys alone


def held() -> list[int]:
    return [kept.tokens for kept in sink_patch.kept_streams]


def test_what_is_kept_is_shown():
    model = llama()
    model.generate(tokens(40), **ASKED)
    assert len(sink_patch.kept_streams) == 1
    kept = next(iter(sink_patch.kept_streams))
    assert (kept.model, kept.tokens) == ("LlamaForCausalLM", 45)
    assert (kept.window_length, kept.num_sink_tokens) == (W, S)
    assert kept.nbytes == sink_patch.kept_streams.nbytes == 2 * (W * SLOTS + SINKS)  # after the answer, and before it
    assert repr(sink_patch.kept_streams).startswith("<1 kept streams, ")


def test_caches_that_two_streams_share_count_once():
    model = llama()
    text = model.generate(tokens(40), **ASKED)
    prompts = [torch.cat((text, tokens(4, seed=seed)), dim=1) for seed in (1, 2)]
    for prompt in prompts:
        model.generate(prompt, **ASKED)
    one, two = sink_patch.kept_streams
    assert sink_patch.kept_streams.nbytes == one.nbytes + two.nbytes - (W * SLOTS + SINKS)


def test_more_bytes_than_the_limit_push_out_what_was_used_least_recently():
    model, other = llama(), copy.deepcopy(llama())
    one = 2 * (W * SLOTS + SINKS)
    sink_patch.kept_streams.limit_bytes(3 * one)
    for number, of in enumerate((model, other, model)):
        of.generate(tokens(40 + number, seed=number), **ASKED)
    assert held() == [45, 46, 47]
    branch = torch.cat((tokens(40)[:, :30], tokens(40, seed=9)), dim=1)
    model.generate(branch, **ASKED)  # begins as the first does, which so counts as used
    assert held() == [47, 45, 75]
    sink_patch.kept_streams.limit_bytes(one)
    assert held() == [75]
    sink_patch.kept_streams.limit_bytes(one - 1)
    assert held() == []
    text = model.generate(tokens(40), **ASKED)
    assert held() == [], "one that is larger than the limit is not kept"
    assert text.shape == (1, 46)


def test_the_number_is_that_of_the_newest_call():
    model, other = llama(), copy.deepcopy(llama())
    for number in range(5):
        model.generate(tokens(40 + number, seed=number), **ASKED)
    other.generate(tokens(30), **ASKED)
    model.generate(tokens(60), **{**ASKED, "keep_streams": 2})
    assert held() == [49, 35, 65]


def test_clear():
    model, other = llama(), copy.deepcopy(llama())
    with counted(model) as forwards:
        for of in (model, other):
            of.generate(tokens(40), **ASKED)
        sink_patch.kept_streams.clear(other)
        assert len(sink_patch.kept_streams) == 1
        forwards.clear()
        model.generate(torch.cat((tokens(40), tokens(20)), dim=1), **ASKED)
        assert sum(forwards) == 36 + 5
    sink_patch.kept_streams.clear()
    assert len(sink_patch.kept_streams) == sink_patch.kept_streams.nbytes == 0


def test_a_model_that_dies_takes_its_streams_along():
    model = copy.deepcopy(llama())
    model.generate(tokens(40), **ASKED)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert len(sink_patch.kept_streams) == 0


def test_a_copy_of_a_model_has_nothing_of_it():
    model = copy.deepcopy(llama())
    text = model.generate(tokens(40), **ASKED)
    twin = copy.deepcopy(model)
    assert "kept" not in repr(vars(twin))
    with counted(twin) as forwards:
        twin.generate(torch.cat((text, tokens(4)), dim=1), **ASKED)
    assert sum(forwards) == 50 + 5


@pytest.mark.parametrize("limit", [-1, True, "8", 1.5, None])
def test_a_limit_that_is_none(limit):
    before = sink_patch.kept_streams.limit
    with pytest.raises(sink_patch.SinkArgumentError, match="Give a number of bytes"):
        sink_patch.kept_streams.limit_bytes(limit)
    assert sink_patch.kept_streams.limit == before


def test_streams_of_what_is_no_model_cannot_be_forgotten():
    with pytest.raises(sink_patch.SinkArgumentError, match="Pass the model"):
        sink_patch.kept_streams.clear("llama")
