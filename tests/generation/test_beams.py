"""Beam search past the window against a search by hand over a naive cache; other outputs and options of `generate`."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, MaxTimeCriteria, StoppingCriteria
from transformers.generation import stopping_criteria as transformers_criteria

from sink_patch import SinkCache
from tests.support import directory
from tests.support.naive import NaiveCache
from tests.support.oracle import relative_error
from tests.support.tiny import tiny, tokens

W, S = 12, 3
SINK = {"cache_implementation": "sink", "window_length": W, "num_sink_tokens": S}
BEAMS = 4
LENGTH = 3 * W
TOLERANCE = 1e-4
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "beam sampling": {"do_sample": True, "num_beams": 3},
}


@pytest.fixture(scope="module")
def model():
    """Two layers; the clock is set back before a text of three windows ends."""
    return tiny("llama", layers=2, max_position_embeddings=24)


def generate(model, ids: torch.Tensor, *, new: int = LENGTH, seed: int = 0, **asked: Any) -> Any:
    torch.manual_seed(seed)
    sums = {"length_penalty": 0.0} if "num_beams" in asked else {}  # the score of a text is the sum over its tokens
    asked = {"max_new_tokens": new, "return_dict_in_generate": True, **sums, **asked}
    return model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **asked)


class Hypotheses:
    """Naive log-probabilities of continuations of one prompt, recomputed from the first token each time."""

    def __init__(self, model, prompt: torch.Tensor):
        self.cache, self.prompt = NaiveCache(model, W, S), prompt

    def following(self, answers: torch.Tensor) -> torch.Tensor:
        """Of each token after each answer [answers, columns]: log-probabilities [answers, vocab]."""
        self.cache.seen = 0
        self.cache.stored.clear()
        logits = self.cache.forward(self.prompt.repeat(len(answers), 1))
        for token in answers.T:
            logits = self.cache.forward(token[:, None])
        return logits[:, -1].log_softmax(-1)

    def scores(self, answers: torch.Tensor) -> torch.Tensor:
        """Of whole answers [answers, columns]: the sums of the log-probabilities of their tokens, [answers]."""
        steps = [self.following(answers[:, :step]) for step in range(answers.shape[1])]
        return sum(one.gather(1, answers[:, step : step + 1])[:, 0] for step, one in enumerate(steps))


def searched(model, prompt: torch.Tensor, beams: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Beam search without an end-of-text token: the best answers [beams, length], and their scores [beams]."""
    hypotheses = Hypotheses(model, prompt)
    answers, scores = torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, dtype=torch.float64)
    for _ in range(length):
        candidates = scores[:, None] + hypotheses.following(answers)  # [beams, vocab]
        scores, best = candidates.flatten().topk(beams)
        parents, token = best // candidates.shape[1], best % candidates.shape[1]
        answers = torch.cat((answers[parents], token[:, None]), dim=1)
    return answers, scores


@pytest.mark.parametrize("prompt_length", [1, W + 6])
def test_beam_search_past_the_window_equals_a_naive_search(model, prompt_length):
    """A prompt of one token is shorter than the sinks, so that each beam has sinks of its own."""
    prompt = tokens(prompt_length, seed=prompt_length)
    answers, scores = searched(model, prompt, BEAMS, LENGTH)
    out = generate(model, prompt, num_beams=BEAMS, num_return_sequences=BEAMS, output_scores=True, **SINK)
    assert torch.equal(out.sequences[:, prompt_length:], answers)
    assert (out.sequences_scores - scores).abs().max() <= TOLERANCE
    assert not torch.equal(answers[0], searched(model, prompt, 1, LENGTH)[0][0])  # greedy search gives another text
    assert len({int(beam) for beam in out.beam_indices[0]}) > 1  # rows of the cache were reordered
    without = generate(model, prompt, num_beams=BEAMS)
    assert not torch.equal(out.sequences[0], without.sequences[0])  # and so does the default cache


@pytest.mark.parametrize("return_sequences", [1, 3])
def test_beam_sampling_past_the_window_scores_its_texts_as_the_naive_cache_does(model, return_sequences):
    prompt = tokens(5)
    asked = {**MODES["beam sampling"], "num_return_sequences": return_sequences, "top_k": 0, "output_scores": True}
    texts = []
    for seed in (0, 1, 0):
        out = generate(model, prompt, seed=seed, **asked, **SINK)
        texts.append(out.sequences[:, prompt.shape[1] :])
        assert texts[-1].shape == (return_sequences, LENGTH)
    wanted = Hypotheses(model, prompt).scores(texts[-1])
    assert (out.sequences_scores - wanted).abs().max() <= TOLERANCE
    assert torch.equal(texts[0], texts[2])
    assert not torch.equal(texts[0], texts[1])


def test_sampled_texts_of_one_prompt_each_follow_their_own_past(model):
    prompt = tokens(5)
    out = generate(model, prompt, do_sample=True, num_return_sequences=3, output_logits=True, **SINK)
    answers = out.sequences[:, prompt.shape[1] :]
    assert len(set(map(tuple, answers.tolist()))) == 3
    hypotheses = Hypotheses(model, prompt)
    for step, logits in enumerate(out.logits):
        wanted = hypotheses.following(answers[:, :step])
        assert relative_error(logits.double().log_softmax(-1), wanted) <= TOLERANCE


EXTRAS = {"output_scores": True, "output_logits": True, "output_attentions": True, "output_hidden_states": True}


def shapes(found: Any) -> Any:
    """The shapes of nested tuples of tensors."""
    return tuple(found.shape) if isinstance(found, torch.Tensor) else tuple(map(shapes, found))


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_below_the_window_all_outputs_equal_those_of_the_default_cache(model, mode):
    prompt = tokens(5, rows=2)
    found, wanted = (
        generate(model, prompt, new=W - 5, **mode, **EXTRAS, **{**SINK, **cache})
        for cache in ({}, {"cache_implementation": None, "window_length": None, "num_sink_tokens": None})
    )
    for name in ("scores", "logits", "attentions", "hidden_states"):
        one, other = getattr(found, name), getattr(wanted, name)
        assert shapes(one) == shapes(other), name
        for first, second in zip(flat(one), flat(other), strict=True):
            assert torch.equal(first, second), name
    assert not isinstance(wanted.past_key_values, SinkCache)


def flat(found: Any) -> list[torch.Tensor]:
    return [found] if isinstance(found, torch.Tensor) else [tensor for one in found for tensor in flat(one)]


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_past_the_window_attentions_have_the_visible_columns(model, mode):
    prompt = tokens(5, rows=2)
    out = generate(model, prompt, **mode, **EXTRAS, **SINK)
    beams = mode.get("num_beams", mode.get("num_return_sequences", 1))
    rows, heads, hidden = 2 * beams, model.config.num_attention_heads, model.config.hidden_size
    assert len(out.scores) == len(out.logits) == len(out.attentions) == len(out.hidden_states) == LENGTH
    for step, (attentions, states) in enumerate(zip(out.attentions, out.hidden_states, strict=True)):
        # each beam is a row from the prompt on
        new, seen = (5, 5) if step == 0 else (1, min(W, 5 + step))
        assert shapes(attentions) == ((rows, heads, new, seen),) * 2
        assert shapes(states) == ((rows, new, hidden),) * 3
        for layer in attentions:
            torch.testing.assert_close(layer.sum(-1), torch.ones(rows, heads, new))


class NoImmediateRepetition(LogitsProcessor):
    """Forbids the newest token to be repeated, and records the lengths of the texts that it is given."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.lengths.append(input_ids.shape[1])
        return scores.scatter(1, input_ids[:, -1:], -torch.inf)


class StopAtLength(StoppingCriteria):
    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_processors_and_criteria_see_the_whole_text_past_the_window(model, mode):
    prompt, processor = tokens(5), NoImmediateRepetition()
    asked = {"logits_processor": [processor], "stopping_criteria": [StopAtLength(40)], "output_scores": True}
    out = generate(model, prompt, new=1000, **mode, **asked, **SINK)
    assert out.sequences.shape[1] == 40
    assert processor.lengths == list(range(5, 40))
    answers = out.sequences[:, 5:]
    assert not (answers[:, 1:] == answers[:, :-1]).any()
    assert out.past_key_values.get_seq_length() == 39


def test_processed_greedy_text_past_the_window_is_the_naive_one(model):
    prompt, hypotheses, processor = tokens(5), Hypotheses(model, tokens(5)), NoImmediateRepetition()
    answer = generate(model, prompt, logits_processor=[processor], **SINK).sequences[:, 5:]
    text = prompt
    for step in range(LENGTH):
        wanted = processor(text, hypotheses.following(answer[:, :step])).argmax(-1)
        assert torch.equal(answer[:, step], wanted), step
        text = torch.cat((text, wanted[:, None]), dim=1)


@pytest.mark.parametrize("given", ["argument", "criteria"])
def test_a_time_limit_stops_a_stream(model, given, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(transformers_criteria, "time", types.SimpleNamespace(time=lambda: next(clock)))
    limit = {"max_time": 40.5} if given == "argument" else {"stopping_criteria": [MaxTimeCriteria(40.5)]}
    out = generate(model, tokens(5), new=1000, **limit, **SINK)
    assert out.sequences.shape[1] == 5 + 41


def test_a_stop_string_past_the_window_stops_a_stream():
    model, tokenizer = directory.model(), directory.tokenizer()
    tokenizer.add_tokens(["abcdef"])  # transformers looks up how this token is continued by others
    prompt = tokenizer("w5 w6 w7 w8", return_tensors="pt")["input_ids"]
    asked = {"do_sample": True, **SINK}
    text = generate(model, prompt, **asked).sequences[0].tolist()
    # a word that occurs for the first time, and is not the beginning of another one
    place = next(place for place in range(2 * W, len(text)) if text[place] > 9 and text[place] not in text[:place])
    out = generate(model, prompt, stop_strings=[f"w{text[place]}"], tokenizer=tokenizer, **asked)
    assert out.sequences[0].tolist() == text[: place + 1]
