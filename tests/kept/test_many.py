"""Several talks with one model, one after the other and at once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

import sink_patch
from tests.kept.talk import SINK, Talk, counted, llama
from tests.support.tiny import tokens

TALKS, TURNS, NEW = 8, 6, 7
SYSTEM = tokens(40, seed=77)  # with which all of them begin


def question(talk: int, turn: int) -> torch.Tensor:
    return tokens(3 + (5 * talk + 11 * turn) % 23, seed=100 * talk + turn)


def test_eight_talks_take_turns():
    model = llama()
    with counted(model) as forwards:
        talks, texts = [Talk(model, forwards) for _ in range(TALKS)], [SYSTEM] * TALKS
        for turn in range(TURNS):
            for number, talk in enumerate(talks):
                new = question(number, turn)
                prompt = torch.cat((texts[number], new), dim=1)
                talk.others = talks[:number] if turn == 0 else ()
                texts[number], read = talk.ask(prompt, NEW)
                if turn:
                    assert read == new.shape[1] + 1
                elif number:
                    assert read < SYSTEM.shape[1], "the beginning that is the same is read once, but for its end"
                assert torch.equal(texts[number], talk.replayed())
    assert len(sink_patch.kept_streams) == TALKS


def test_one_talk_more_than_are_kept_pushes_out_the_one_that_was_silent_longest():
    model = llama()
    with counted(model) as forwards:
        talks = [Talk(model, forwards) for _ in range(4)]
        for talk in talks:
            talk.asked["keep_streams"] = 3
        texts = [talk.ask(tokens(30, seed=number), NEW)[0] for number, talk in enumerate(talks)]
        talks[0].calls = []
        _, read = talks[0].ask(torch.cat((texts[0], tokens(2)), dim=1), NEW)  # takes the place of talk 1
        assert read == texts[0].shape[1] + 2
        for number, new in ((2, 3), (3, 3)):
            _, read = talks[number].ask(torch.cat((texts[number], tokens(2)), dim=1), NEW)
            assert read == new
        talks[1].calls = []
        assert talks[1].ask(torch.cat((texts[1], tokens(2)), dim=1), NEW)[1] == texts[1].shape[1] + 2


def test_two_calls_at_once_go_on_in_copies_of_one_stream():
    model, asked = llama(), {**SINK, "do_sample": False, "keep_streams": 8}
    text = model.generate(tokens(40), max_new_tokens=NEW, **asked)
    prompts = [torch.cat((text, tokens(25, seed=seed)), dim=1) for seed in (1, 2)]
    wanted = []
    for prompt in prompts:
        sink_patch.kept_streams.clear()
        model.generate(tokens(40), max_new_tokens=NEW, **asked)
        wanted.append(model.generate(prompt, max_new_tokens=30, **asked))
    sink_patch.kept_streams.clear()
    model.generate(tokens(40), max_new_tokens=NEW, **asked)
    start = threading.Barrier(2)

    def run(prompt: torch.Tensor) -> torch.Tensor:
        start.wait()
        return model.generate(prompt, max_new_tokens=30, **asked)

    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(run, prompts))
    assert all(map(torch.equal, found, wanted))
    assert not torch.equal(*(one[:, -30:] for one in wanted))
    assert len(sink_patch.kept_streams) == 2


def test_many_threads_each_with_its_own_talk():
    """As in a server without a queue: whatever is kept by then, each text is one of the same talk alone."""
    model, asked = llama(), {**SINK, "do_sample": False, "keep_streams": 3}

    def talk(number: int) -> list[torch.Tensor]:
        text, texts = tokens(20 + number, seed=number), []
        for turn in range(4):
            text = model.generate(torch.cat((text, question(number, turn)), dim=1), max_new_tokens=NEW, **asked)
            texts.append(text)
        return texts

    alone = []
    for number in range(3):
        sink_patch.kept_streams.clear()
        alone.append(talk(number))
    sink_patch.kept_streams.clear()
    with ThreadPoolExecutor(3) as threads:
        for found, wanted in zip(threads.map(talk, range(3)), alone, strict=True):
            assert all(map(torch.equal, found, wanted))
