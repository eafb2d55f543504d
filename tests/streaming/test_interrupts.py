"""Ctrl-C at any place of ours in a forward, or between two: the next says that the cache is broken, or is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sink_patch import CacheStateError, SinkCache
from sink_patch.streaming.bound import streams_of
from sink_patch.streaming.steps import ahead
from tests.support.interrupts import is_interrupted
from tests.support.replay import cache_name
from tests.support.tiny import tiny, tokens

# an interrupt as a generator is closed is lost, and Python says so
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

W, S = 12, 3


def feed(model: Any, cache: SinkCache, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, **{cache_name(model): cache}).logits[:, -1]


def text_of(cache: SinkCache) -> list[int]:
    """What the cache says that it has read."""
    rows = streams_of(cache).history.rows
    return [] if not rows else rows[0].newest.tolist()


def feed_outside(model: Any, cache: SinkCache, ids: torch.Tensor) -> torch.Tensor:
    """As through a graph, without a compiler."""
    return streams_of(cache).run_outside(
        model, ids, None, lambda given: model(ids, **{cache_name(model): cache}, **given).logits[:, -1]
    )


@pytest.mark.parametrize(
    ("before", "columns", "feed_it"),
    [
        pytest.param((), 5, feed, id="a first prompt"),
        pytest.param((5,), 1, feed, id="a token while the window fills"),
        pytest.param((30, 1, 1), 1, feed, id="a token that was planned ahead"),
        pytest.param((30,), 1, feed, id="steps are made ahead"),
        pytest.param((30,), 4, feed, id="a prompt behind a full window"),
        pytest.param((39,), 1, feed, id="the clock is set back"),
        pytest.param((30,), 1, feed_outside, id="a token through a graph"),
    ],
)
@torch.no_grad()
def test_at_any_place_in_a_forward(before, columns, feed_it, monkeypatch):
    monkeypatch.setattr(ahead, "_AT_ONCE", 2)
    model = tiny("llama", layers=1, max_position_embeddings=40)
    stream, number, ends = tokens(60), 0, {"broken": 0, "goes on": 0}
    pieces = stream.split([*before, columns, 60 - sum(before) - columns], dim=1)
    while True:
        number += 1
        cache = SinkCache(W, S, model=model)
        for piece in pieces[: len(before)]:
            feed(model, cache, piece)
        if not is_interrupted(number, lambda: feed_it(model, cache, pieces[len(before)])):  # noqa: B023
            break
        following = pieces[-1].split(1, dim=1)[:3]
        try:
            found = [feed(model, cache, token) for token in following]
        except CacheStateError as error:
            assert "Call reset()" in str(error), number  # noqa: PT017
            ends["broken"] += 1
            continue
        read, (row,) = text_of(cache), streams_of(cache).rows
        assert row.seen == len(read) == cache.get_seq_length(), number
        said = len(read) - len(following)
        assert said in (sum(before), sum(before) + columns), number
        assert read[:said] == stream[0, :said].tolist(), number
        twin = SinkCache(W, S, model=model)
        for piece in pieces[: len(before)]:
            feed(model, twin, piece)
        if said > sum(before):
            feed_it(model, twin, pieces[len(before)])
        wanted = [feed(model, twin, token) for token in following]
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True)), number
        ends["goes on"] += 1
    assert ends["goes on"] > 100, ends


VERBS: dict[str, Callable[[SinkCache], object]] = {
    "reorder_cache": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "batch_select_indices": lambda cache: cache.batch_select_indices(torch.tensor([1])),
    "batch_repeat_interleave": lambda cache: cache.batch_repeat_interleave(2),
    "no rows": lambda cache: cache.batch_select_indices(torch.tensor([], dtype=torch.long)),
    "join": lambda cache: cache.join(cache.other),
    "crop": lambda cache: cache.crop(-2),
    "activate_past_recording": lambda cache: cache.activate_past_recording(20),
    "deactivate_past_recording": lambda cache: cache.deactivate_past_recording(),
    "reset": lambda cache: cache.reset(),
}


def read(cache: SinkCache) -> tuple[Any, ...]:
    """What its rows have read, as they and the history say."""
    streams = streams_of(cache)
    texts = [row.newest.tolist() for row in streams.history.rows or ()]
    return [row.seen for row in streams.rows or ()], texts, cache.get_seq_length()


def goes_on(model: Any, cache: SinkCache) -> list[torch.Tensor]:
    rows = max(1, cache.batch_size)
    return [feed(model, cache, token) for token in tokens(3, rows, seed=9).split(1, dim=1)]


def are_close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Spare slots change the order of keys, and so the last digits."""
    return one.shape == other.shape and torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("verb", VERBS)
@torch.no_grad()
def test_at_any_place_of_what_is_done_between_two_forwards(verb):
    model, number, ends = tiny("llama", layers=2, max_position_embeddings=40), 0, {"broken": 0, "goes on": 0}

    def fed() -> SinkCache:
        cache = SinkCache(W, S, model=model)
        feed(model, cache, tokens(8, 2))
        if verb in ("crop", "deactivate_past_recording"):
            cache.activate_past_recording(4)
        feed(model, cache, tokens(34, 2)[:, :3])
        for token in tokens(28, 2, seed=3).split(1, dim=1):
            feed(model, cache, token)
        cache.other = other
        return cache

    other = SinkCache(W, S, model=model)
    feed(model, other, tokens(20, seed=5))
    whole, done = fed(), fed()
    VERBS[verb](done)
    twins = [(read(cache), goes_on(model, cache)) for cache in (whole, done)]
    while True:
        number += 1
        cache = fed()
        if not is_interrupted(number, lambda: VERBS[verb](cache)):  # noqa: B023
            break
        try:
            found = read(cache), goes_on(model, cache)
        except CacheStateError as error:
            assert "Call reset()" in str(error), number  # noqa: PT017
            cache.reset()
            assert cache.get_seq_length() == 0
            feed(model, cache, tokens(20, 3))
            ends["broken"] += 1
            continue
        same = [said == found[0] and all(map(are_close, logits, found[1])) for said, logits in twins]
        assert any(same), number
        ends["goes on"] += 1
    assert ends["goes on"] > 5, ends
