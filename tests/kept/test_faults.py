"""A call that breaks off, wherever it does: what is kept stays whole, and no later text is wrong."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import sink_patch
from sink_patch import SinkCache
from tests.kept.lineages import Forwards, Lineages, columns_of, replayed
from tests.kept.talk import SINK
from tests.support.tiny import tiny, tokens

FAULTS = 200
NEW = 6


class Fault(Exception):
    """What the client or the machine did."""


@contextlib.contextmanager
def recorded(model: PreTrainedModel) -> Iterator[Forwards]:
    """Inside, the ids of each forward that came to its end."""
    forwards: Forwards = []

    def note(_module: Any, args: Any, given: dict[str, Any], _out: Any) -> None:
        if any(isinstance(value, SinkCache) for value in given.values()):
            forwards.append(given["input_ids"].clone())

    handle = model.register_forward_hook(note, with_kwargs=True)
    try:
        yield forwards
    finally:
        handle.remove()


class Countdown(BaseStreamer, StoppingCriteria):
    """Raises when it is called for the n-th time, as a streamer whose client is gone, or as a stopping criterion."""

    def __init__(self, count: int, failure: BaseException):
        self.left, self.failure = count, failure

    def fail(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.failure

    def put(self, value: torch.Tensor) -> None:
        self.fail()

    def end(self) -> None:
        """Nothing is left to do."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.fail()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@contextlib.contextmanager
def failing(model: PreTrainedModel, where: str, count: int, failure: BaseException) -> Iterator[dict[str, Any]]:
    """Inside, a call with these arguments breaks off."""
    countdown = Countdown(count, failure)
    if where == "streamer":
        yield {"streamer": countdown}
    elif where == "criterion":
        yield {"stopping_criteria": StoppingCriteriaList([countdown])}
    else:
        layer = model.model.layers[0 if where == "first layer" else -1]
        inner = layer.mlp.forward
        layer.mlp.forward = lambda *args: (countdown.fail(), inner(*args))[1]
        try:
            yield {}
        finally:
            del layer.mlp.forward


class Chat:
    """A chat whose calls break off.

    Args:
        model: of the calls.
        forwards: where `recorded` notes its forwards.
    """

    def __init__(self, model: PreTrainedModel, forwards: Forwards):
        self.model, self.forwards = model, forwards
        self.lineages = Lineages()
        self.asked = {**SINK, "do_sample": False, "max_new_tokens": NEW, "keep_streams": 99}

    def ask(self, prompt: torch.Tensor) -> torch.Tensor:
        """The text after a prompt; it is that of the same forwards on a fresh cache."""
        self.forwards.clear()
        text = self.model.generate(prompt, **self.asked)
        ahead = list(self.forwards[: len(self.forwards) - (NEW - 1)])
        known = prompt.shape[1] - columns_of(ahead)
        beginnings = self.lineages.beginnings(prompt, known)
        assert any(torch.equal(replayed(self.model, [*before, *ahead], prompt, NEW), text) for before in beginnings)
        self.lineages.add(prompt, known, self.forwards)
        return text

    def break_off(self, prompt: torch.Tensor, where: str, count: int, failure: BaseException) -> None:
        before = held()
        self.forwards.clear()
        with failing(self.model, where, count, failure) as given, pytest.raises(type(failure)):
            self.model.generate(prompt, **self.asked, **given)
        assert not Counter(before) - Counter(held()), "a stream that was whole is lost"
        if len(held()) > len(before):
            self.lineages.add(prompt, held()[-1] - columns_of(self.forwards), self.forwards)

    def said_so_far(self, prompt: torch.Tensor) -> torch.Tensor:
        """The prompt of the newest call, and what of its answer was read."""
        read = torch.cat([prompt[:, :0], *self.forwards], dim=1)
        for known in range(prompt.shape[1]):
            new = prompt[:, known:]
            if torch.equal(read[:, : new.shape[1]], new):
                return torch.cat((prompt[:, :known], read), dim=1)
        return prompt


def held() -> list[int]:
    return [kept.tokens for kept in sink_patch.kept_streams]


PLACES: dict[str, Callable[[], BaseException]] = {
    "an exception": Fault,
    "Ctrl-C": KeyboardInterrupt,
    "out of memory": lambda: torch.OutOfMemoryError("of a test"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", PLACES)
def test_after_a_fault_no_text_is_wrong_and_no_stream_is_lost(kind):
    model, rng, done = tiny("llama", layers=1, max_position_embeddings=64), random.Random(kind), 0
    with recorded(model) as forwards:
        while done < FAULTS // len(PLACES) + 1:
            sink_patch.kept_streams.clear()
            chat = Chat(model, forwards)
            history = chat.ask(tokens(rng.randint(10, 45), seed=done))
            for _ in range(2):
                prompt = torch.cat((history, tokens(rng.randint(1, 30), seed=done)), dim=1)
                where = rng.choice(["streamer", "criterion", "first layer", "last layer"])
                chat.break_off(prompt, where, rng.randint(1, NEW), PLACES[kind]())
                then = rng.choice(["the same again", "something else", "after what was said so far"])
                if then == "something else":
                    prompt = torch.cat((history, tokens(rng.randint(1, 30), seed=done + 500)), dim=1)
                elif then == "after what was said so far":
                    prompt = torch.cat((chat.said_so_far(prompt), tokens(rng.randint(1, 9), seed=done)), dim=1)
                history = chat.ask(prompt)
                done += 1
    assert done >= FAULTS // len(PLACES)


def test_a_prompt_that_is_refused_leaves_all_as_it_was():
    model = tiny("llama", layers=2, max_position_embeddings=64)
    asked = {**SINK, "do_sample": False, "max_new_tokens": 3, "keep_streams": 2}
    text = model.generate(tokens(40), **asked)
    mask = torch.ones_like(text)
    mask[:, -1] = 0
    with pytest.raises(sink_patch.SinkArgumentError):
        model.generate(text, attention_mask=mask, **asked)
    assert held() == [42]
