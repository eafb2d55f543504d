"""A call whose prompt begins with a kept stream goes on in it, and says what the same forwards on one cache say."""

from __future__ import annotations

import random

import pytest
import torch

import sink_patch
from sink_patch import SinkCache
from tests.kept.talk import SINK, S, Talk, W, counted, llama
from tests.support.tiny import tiny, tokens

TURNS = 25
MARGIN = 16  # tokens at the end of a prompt that may be read twice
NO_END = {"eos_token_id": 500, "pad_token_id": 501}  # prompt lookup needs these
FAMILIES = {"llama": {}, "gemma3_text": {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_turn_of_a_growing_history_reads_its_new_tokens_alone(family):
    model, rng = tiny(family, layers=2, max_position_embeddings=64, **FAMILIES[family]), random.Random(0)
    lengths = [3, W + 9, *(rng.randint(1, 30) for _ in range(TURNS - 2))]
    with counted(model) as forwards:
        talk, text, known = Talk(model, forwards), tokens(0), 0
        for turn, length in enumerate(lengths):
            prompt = torch.cat((text, tokens(length, seed=turn)), dim=1)
            text, read = talk.ask(prompt, rng.randint(1, 12))
            assert read == prompt.shape[1] - known
            known = text.shape[1] - 1  # the last token of an answer is not read
            assert torch.equal(text, talk.replayed())
    assert len(sink_patch.kept_streams) == 1
    assert text.shape[1] > 10 * W


def test_an_answer_that_is_written_anew_is_read_again_and_nothing_else():
    """As Qwen3 does: what the answer begins with is in no later prompt, nor is the end of the prompt before it."""
    model, rng, opening = llama(), random.Random(1), tokens(5, seed=99)
    with counted(model) as forwards:
        talk, history, exchange = Talk(model, forwards), tokens(9), 0
        for turn in range(20):
            question, thoughts = tokens(rng.randint(3, 20), seed=turn), rng.randint(0, 9)
            prompt = torch.cat((history, question, opening), dim=1)
            text, read = talk.ask(prompt, thoughts + rng.randint(1, 12))
            assert read <= exchange + question.shape[1] + opening.shape[1] + MARGIN or turn == 0
            assert torch.equal(text, talk.replayed())
            said = text[:, prompt.shape[1] + thoughts :]
            history, exchange = torch.cat((history, question, said), dim=1), said.shape[1]
    assert prompt.shape[1] > 10 * W
    assert len(sink_patch.kept_streams) < 20


def test_answers_that_are_cut_take_the_place_of_what_they_were():
    """Else a single talk would fill the store."""
    talk, history = llama(), tokens(30)
    for turn in range(6):
        text = talk.generate(history, max_new_tokens=12, do_sample=False, keep_streams=8, **SINK)
        answer = text[:, history.shape[1] + 5 :]  # without its thoughts
        history = torch.cat((history[:, :-3], answer, tokens(20, seed=turn)), dim=1)
    assert len(sink_patch.kept_streams) == 1


@pytest.mark.parametrize("tail", [5, 40])
def test_the_same_prompt_again_reads_its_end_alone(tail):
    model = llama()
    with counted(model) as forwards:
        talk = Talk(model, forwards)
        prompt = torch.cat((tokens(100), tokens(tail, seed=1)), dim=1)
        talk.ask(tokens(100), 5)
        first, _ = talk.ask(prompt, 20)
        calls = list(talk.calls)
        for _ in range(3):
            again, read = talk.ask(prompt, 20)
            assert read <= MARGIN
            assert torch.equal(again, talk.replayed())
            assert torch.equal(again, first)  # the same forwards
            talk.calls = list(calls)
    assert len(sink_patch.kept_streams) == 1  # the prompt is the first one and more, and its answer is always the same


def test_the_last_message_may_be_another_one():
    """Where answers are repeated as they were, a short message goes in at once, behind a stream that stays."""
    model = llama()
    with counted(model) as forwards:
        talk = Talk(model, forwards)
        history, _ = talk.ask(tokens(50), 5)
        calls = list(talk.calls)
        for seed in (1, 1, 2, 1, 3):
            talk.calls = list(calls)
            text, read = talk.ask(torch.cat((history, tokens(20, seed=seed)), dim=1), 9)
            assert (read, forwards[0]) == (21, 21)
            assert torch.equal(text, talk.replayed())


def test_a_long_message_is_not_read_twice():
    model = llama()
    with counted(model) as forwards:
        talk = Talk(model, forwards)
        prompt = torch.cat((talk.ask(tokens(50), 5)[0], tokens(300, seed=1)), dim=1)
        assert talk.ask(prompt, 9)[1] == 301
        text, read = talk.ask(prompt, 9)
        assert read == MARGIN
        assert torch.equal(text, talk.replayed())


def test_a_window_that_holds_all_goes_back_to_where_texts_part():
    """Nothing has left it, so that no copy is needed, and any beginning can be got at."""
    model, sizes = llama(max_position_embeddings=512), {"window_length": 200}
    with counted(model) as forwards:
        talk = Talk(model, forwards)
        talk.asked |= sizes
        text, _ = talk.ask(tokens(60), 20)
        assert forwards == [60, *[1] * 19], "in one piece"
        branch = torch.cat((text[:, :50], tokens(30, seed=5)), dim=1)
        forwards.clear()
        made = model.generate(branch, max_new_tokens=20, **talk.asked)
        assert sum(forwards) == 30 + 19
        wanted = model.generate(branch, max_new_tokens=20, **{**talk.asked, "keep_streams": None})
        assert torch.equal(made, wanted)
        assert all(kept.nbytes == next(iter(sink_patch.kept_streams)).nbytes for kept in sink_patch.kept_streams)
    assert len(sink_patch.kept_streams) == 2


def test_padding_before_a_prompt_is_no_part_of_its_text():
    model, new = llama(), 9
    with counted(model) as forwards:
        talk = Talk(model, forwards)
        text, _ = talk.ask(tokens(40), new)
        prompt = torch.cat((text, tokens(25, seed=3)), dim=1)
        plain, _ = talk.ask(prompt, new)
        for padding in (1, 7, 0, 30):
            sink_patch.kept_streams.clear()
            talk.ask(tokens(40), new)
            padded = torch.nn.functional.pad(prompt, (padding, 0), value=0)
            mask = torch.nn.functional.pad(torch.ones_like(prompt), (padding, 0), value=0)
            forwards.clear()
            found = model.generate(padded, attention_mask=mask, max_new_tokens=new, **talk.asked)
            assert sum(forwards) == 26 + new - 1
            assert torch.equal(found[:, padding:], plain)
            longer = torch.cat((plain, tokens(4, seed=8)), dim=1)
            forwards.clear()
            model.generate(longer, max_new_tokens=1, **talk.asked)  # what was read behind padding serves without it
            assert sum(forwards) == 5


@pytest.mark.parametrize("size", [7, 16, 40])
def test_prompts_in_pieces(size):
    model = llama()
    with counted(model) as forwards:
        talk, text = Talk(model, forwards), tokens(0)
        for turn, length in enumerate((90, 33, 8, 50)):
            known = max(0, text.shape[1] - 1)
            text, read = talk.ask(torch.cat((text, tokens(length, seed=turn)), dim=1), 10, prefill_chunk_size=size)
            assert read == text.shape[1] - 10 - known
            assert max(forwards) <= size
            assert torch.equal(text, talk.replayed())


def test_drafts_go_on_in_kept_streams():
    """By prompt lookup: each turn reads its new tokens, and the text is that of drafts on a cache of the caller's."""
    model, text, known = llama(), tokens(40), 0
    cache = SinkCache(W, S, model=model)
    asked = {"do_sample": False, "max_new_tokens": 12, "prompt_lookup_num_tokens": 3, **NO_END}
    with counted(model) as forwards:
        for turn in range(4):
            prompt = torch.cat((text, tokens(20, seed=turn)), dim=1)
            forwards.clear()
            text = model.generate(prompt, keep_streams=2, **SINK, **asked)
            ahead = prompt.shape[1] - 1 - known
            pieces = [ahead - 15, 15] if turn == 0 else [ahead]  # the last token goes with the first draft
            assert forwards[: len(pieces)] == pieces
            if turn == 0:
                with torch.no_grad():
                    model(prompt[:, : ahead - 15], past_key_values=cache)
            assert torch.equal(text, model.generate(prompt, past_key_values=cache, **asked))
            known = next(iter(sink_patch.kept_streams)).tokens
    assert len(sink_patch.kept_streams) == 1


def test_two_windows_are_two_streams():
    model, text = llama(), tokens(40)
    with counted(model) as forwards:
        talk = Talk(model, forwards)
        longer = torch.cat((talk.ask(text, 9)[0], tokens(5)), dim=1)
        other = {"num_sink_tokens": S + 1}
        forwards.clear()
        found = model.generate(longer, max_new_tokens=9, **{**talk.asked, **other})
        assert sum(forwards) == longer.shape[1] + 8, "nothing of the other window is used"
        sink_patch.kept_streams.clear()
        assert torch.equal(found, model.generate(longer, max_new_tokens=9, **{**talk.asked, **other}))
