"""Ctrl-C in a call of `generate`, at the last visit of each line of ours: what comes next is right."""

from __future__ import annotations

import copy
import itertools
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
    """At most the piece that was on its way is lost; the text goes on behind it."""
    model, begun, ended = directory.model(), list[tuple[Any, list[str]]](), 0

    def new_stream() -> Any:
        asked = {"do_sample": False, "skip_special_tokens": False, "repetition_penalty": 1.5, **SIZES}
        return sink_patch.stream(model, directory.tokenizer(), "w5 w6 w7 w8", **asked)

    def begin() -> Callable[[], object]:
        stream, pieces = new_stream(), list[str]()
        begun.append((stream, pieces))
        return lambda: [pieces.append(next(stream)) for _ in range(12)]

    wanted = list(itertools.islice(new_stream(), 20))
    assert len(set(wanted)) > 10
    for number in interrupts(begin):
        goes_on_without(model)
        stream, pieces = begun.pop()
        assert pieces == wanted[: len(pieces)], number
        try:
            text = "".join(itertools.islice(stream, 4))
        except CacheStateError as error:
            assert "in its own step" not in str(error), number  # noqa: PT017
            continue
        ended += 1
        assert any("".join(wanted[len(pieces) + lost :]).startswith(text) for lost in (0, 1)), number
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
    assert wanted is not None
