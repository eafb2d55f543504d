"""Ctrl-C in a call of `generate`, at the last visit of each line of ours: what comes next is right."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import sink_patch
from sink_patch import CacheStateError, SinkCache
from tests.support import directory
from tests.support.interrupts import is_interrupted, last_visits
from tests.support.replay import cache_name
from tests.support.tiny import tiny, tokens

# an interrupt as a generator is closed is lost, and Python says so
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

W, S = 12, 3
SIZES = {"window_length": W, "num_sink_tokens": S}
ASKED = {"do_sample": False, "max_new_tokens": 3}
SINK = {**ASKED, "cache_implementation": "sink", **SIZES, "keep_streams": 2}
TEXT = tokens(20)


def new_model(**settings: Any) -> Any:
    return copy.deepcopy(tiny("llama", layers=1, **settings))


def interrupts(begin: Callable[[], Callable[[], object]]) -> Iterator[int]:
    """Interrupts what `begin` returns again and again, each time somewhere else; yields after each time."""
    numbers = last_visits(begin())
    assert len(numbers) > 100
    for number in numbers:
        if is_interrupted(number, begin()):
            yield number


def goes_on_without(model: Any) -> None:
    """The model itself, and `generate` without us."""
    model(tokens(4), use_cache=False)
    model.generate(tokens(4), do_sample=False, max_new_tokens=2)


@torch.no_grad()
def test_the_first_call_with_a_model():
    wanted, models = new_model().generate(TEXT, **SINK), list[Any]()

    def begin() -> Callable[[], object]:
        models.append(new_model())
        return lambda: models[-1].generate(TEXT, **SINK)

    for number in interrupts(begin):
        goes_on_without(models[-1])
        assert torch.equal(models.pop().generate(TEXT, **SINK), wanted), number


@torch.no_grad()
def test_a_call_in_a_cache_of_the_users():
    model, caches, ended = new_model(), list[SinkCache](), 0
    wanted = model.generate(TEXT, **SINK)
    other = SinkCache(W, S, model=model)
    model(TEXT, **{cache_name(model): other})

    def begin() -> Callable[[], object]:
        caches.append(SinkCache(W, S, model=model))
        return lambda: model.generate(TEXT, **ASKED, **{cache_name(model): caches[-1]})

    for number in interrupts(begin):
        goes_on_without(model)
        cache, broken = caches.pop(), None
        try:
            cache.join(other)  # which a call in progress would not have
        except CacheStateError as error:
            broken = error
            assert "Call reset()" in str(error), number  # noqa: PT017
        ended += broken is None
        cache.reset()
        assert torch.equal(model.generate(TEXT, **ASKED, **{cache_name(model): cache}), wanted), number
    assert ended > 100


@torch.no_grad()
def test_a_step_of_a_text_without_end():
    model, streams, ended = directory.model(), list[Any](), 0

    def begin() -> Callable[[], object]:
        given = torch.tensor([[5, 6, 7, 8]]) if len(streams) % 2 else "w5 w6 w7 w8"
        streams.append(sink_patch.stream(model, directory.tokenizer(), given, do_sample=False, **SIZES))
        return lambda: [next(streams[-1]) for _ in range(3)]

    for number in interrupts(begin):
        goes_on_without(model)
        try:
            next(streams.pop())
            ended += 1
        except CacheStateError as error:
            assert "in its own step" not in str(error), number  # noqa: PT017
    assert ended > 50


def test_patching_and_its_undoing():
    def begin() -> Callable[[], object]:
        sink_patch.unpatch()
        return lambda: (sink_patch.patch(), sink_patch.unpatch())

    model, numbers = new_model(), last_visits(begin())
    wanted = None
    for number in numbers:
        if not is_interrupted(number, begin()):
            continue
        sink_patch.unpatch()
        sink_patch.patch()
        text = model.generate(TEXT, **SINK)
        wanted = text if wanted is None else wanted
        assert torch.equal(text, wanted), number
