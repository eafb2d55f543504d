"""What cannot join is refused before anything is changed: both caches go on as if nobody had asked."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from transformers import LogitsProcessorList

from sink_patch import CacheStateError, SinkArgumentError, SinkCache, UnboundCacheError
from sink_patch.buffers import store
from sink_patch.streaming.bound import streams_of
from tests.support.caches import BareCache
from tests.support.chats import TURN_START
from tests.support.exact import forward
from tests.support.known_gaps import is_newest
from tests.support.tiny import tiny, tokens

W, S = 8, 3
TURNS = {"evict": "turns", "turn_start": TURN_START}


def model(**settings):
    return tiny("llama", layers=2, max_position_embeddings=40, **settings)


def cache_of(one, count=20, window=W, sinks=S, **more):
    cache = SinkCache(window, sinks, model=one, **more)
    with torch.no_grad():
        forward(one, cache, tokens(count, seed=count))
    return cache


def bfloat16():
    one = copy.deepcopy(model())
    cache, other = cache_of(one), SinkCache(W, S, model=one)
    forward(one.bfloat16(), other, tokens(5))
    return one, cache, other


def changed():
    """Its adapters were found anew, and are others."""
    one = model()
    cache, other = cache_of(one), cache_of(one, 5)
    facts = streams_of(other).facts
    streams_of(other).facts = replace(facts, context=replace(facts.context, length=facts.context.length + 1))
    return one, cache, other


def broken():
    one = model()
    cache, other = cache_of(one), cache_of(one, 5)
    streams_of(other).forward.break_off("Something failed.")
    return one, cache, other


WRONG = {
    "another window": (
        lambda: (model(), cache_of(model()), cache_of(model(), 5, window=W + 1)),
        (SinkArgumentError, "window_length=8 and window_length=9 were asked to join. Make both with the same"),
    ),
    "other sinks": (
        lambda: (model(), cache_of(model()), cache_of(model(), 5, sinks=1)),
        (SinkArgumentError, "num_sink_tokens=3 and num_sink_tokens=1"),
    ),
    "whole messages and single tokens": (
        lambda: (model(), cache_of(model()), cache_of(model(), 5, **TURNS)),
        (SinkArgumentError, "evict='tokens' and evict='turns', turn_start="),
    ),
    "no SinkCache": (
        lambda: (model(), cache_of(model()), BareCache()),
        (SinkArgumentError, "was asked to join a BareCache. Give another SinkCache"),
    ),
    "one without a model": (
        lambda: (model(), cache_of(model()), SinkCache(W, S)),
        (UnboundCacheError, r"unbound.* cannot be joined: it has no model"),
    ),
    "to one without a model": (
        lambda: (model(), SinkCache(W, S), cache_of(model())),
        (UnboundCacheError, r"unbound.* cannot be joined: it has no model"),
    ),
    "another model": (
        lambda: (model(), cache_of(model()), cache_of(model(seed=1), 5)),
        (CacheStateError, "which belongs to another model"),
    ),
    "the decoder of the model": (
        lambda: (model(), cache_of(model()), SinkCache(W, S, model=model().model)),
        (CacheStateError, "which belongs to another model"),
    ),
    "the model before it was changed": (changed, (CacheStateError, "what this one was before it was changed")),
    "another dtype": (bfloat16, (CacheStateError, r"keys of layer 0: torch.float32 \[2, 16\] on cpu here, torch.bfl")),
    "lost tokens": (broken, (CacheStateError, r"cannot join .*Something failed. Call reset\(\)")),
}


@pytest.mark.parametrize("name", WRONG)
@torch.no_grad()
def test_each_refusal_leaves_both_caches_as_they_were(name):
    make, (kind, message) = WRONG[name]
    one, *caches = make()
    before = [state(cache) for cache in caches]
    with pytest.raises(kind, match=message):
        caches[0].join(caches[1])
    assert all(same(state(cache), found) for cache, found in zip(caches, before, strict=True))
    if streams_of(caches[0]).rows if caches[0].layers else False:
        if name == "another dtype":
            one.float()
        forward(one, caches[0], tokens(1))


def state(cache):
    """All that a cache holds, in words and tensors."""
    streams = getattr(cache, "_streams", None)
    if streams is None:
        return None
    rings = [ring for layer in streams.store.sink_layers for ring in layer.rings]
    tensors = [copy.deepcopy(held) for ring in rings for held in (ring.buffer, streams.store.sinks.pristine_of(ring))]
    plain = (streams.rows, streams.columns, streams.store.slots, streams.recording, streams.forward.phase)
    return copy.deepcopy((*plain, streams.history.rows)), tensors


def same(one, other):
    if one is None or other is None:
        return one is other
    pairs = zip(one[1], other[1], strict=True)
    return one[0] == other[0] and all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("place", ["embed_tokens", "layers.0.mlp", "layers.1.mlp"])
@torch.no_grad()
def test_a_cache_in_the_middle_of_a_forward_is_not_joined_to_another(place):
    one, found = model(), []
    cache, other, undisturbed = cache_of(one), cache_of(one), cache_of(one)

    def hook(*_):
        for first, second in ((cache, other), (other, cache)):
            with pytest.raises(CacheStateError, match="cannot be joined in the middle of a forward"):
                first.join(second)
            found.append(first.batch_size)

    handle = one.model.get_submodule(place).register_forward_pre_hook(hook)
    logits = forward(one, other, tokens(1))
    handle.remove()
    assert found == [1, 1]
    assert torch.equal(logits, forward(one, undisturbed, tokens(1)))
    cache.join(other)
    assert cache.batch_size == 2


def test_a_call_of_generate_keeps_its_rows():
    one, found = model(), []
    cache, other = SinkCache(W, S, model=one), cache_of(one)

    def joined(ids, scores):
        with pytest.raises(CacheStateError, match=r"in the middle of a call of generate.*Wait for its end"):
            cache.join(other)
        other.join(cache)  # what has been read so far may be copied
        found.append(other.batch_size)
        return scores

    asked = {"do_sample": False, "max_new_tokens": 3, "past_key_values": cache}
    one.generate(tokens(6), logits_processor=LogitsProcessorList([joined]), **asked)
    assert found == [2, 3, 4]
    assert cache.batch_size == 1


@pytest.mark.skipif(not is_newest(), reason="what sliding windows see does not depend on transformers")
@torch.no_grad()
def test_rows_that_hold_less_than_sliding_windows_see_join_when_they_have_read_more():
    types = ["sliding_attention", "full_attention"]
    one = tiny("gemma3_text", layers=2, layer_types=types, sliding_window=7)
    cache, other = (SinkCache(12, S, model=one, **TURNS) for _ in range(2))
    forward(one, cache, tokens(4))
    begins = TURN_START[0][0]
    for place in range(13):  # the second message leaves as a whole, and one token of the third has been read then
        forward(one, other, torch.tensor([[begins if place in (0, 3, 11) else 50 + place]]))
    (row,) = streams_of(other).rows
    missing = 6 - (row.seen - row.dropped)
    assert missing == 1
    for first, second, row in ((cache, other, 1), (other, cache, 0)):
        with pytest.raises(CacheStateError, match=f"left row {row} of them .* {missing} tokens fewer .*so many tokens"):
            first.join(second)
    alone = SinkCache(12, S, model=one, **TURNS)
    alone.join(other)  # one row has its mask for itself
    for step in range(missing):
        forward(one, other, torch.full((1, 1), 50 + step))
    cache.join(other)
    assert forward(one, cache, tokens(1, rows=2)).isfinite().all()


@torch.no_grad()
def test_a_join_for_which_there_is_no_memory_changes_nothing(monkeypatch):
    one = model()
    cache, other, calls = cache_of(one), cache_of(one, 5), []
    before = [state(each) for each in (cache, other)]

    def stacked(*given):
        calls.append(given)
        if len(calls) > 3:
            raise MemoryError
        return original(*given)

    original = store.stacked
    monkeypatch.setattr(store, "stacked", stacked)
    with pytest.raises(MemoryError):
        cache.join(other)
    assert all(same(state(each), found) for each, found in zip((cache, other), before, strict=True))
    calls.clear()
    monkeypatch.setattr(store, "stacked", original)
    cache.join(other)
    assert cache.batch_size == 2


@torch.no_grad()
def test_a_join_that_is_interrupted_leaves_a_cache_that_says_so(monkeypatch):
    one = model()
    cache, other = cache_of(one), cache_of(one, 5)
    before = state(other)

    def put(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store.Sinks, "put", put)
        with pytest.raises(KeyboardInterrupt):
            cache.join(other)
    assert same(state(other), before)
    with pytest.raises(CacheStateError, match=r"Rows could not be joined .*reset\(\)"):
        forward(one, cache, tokens(1, rows=2))
    cache.reset()
    cache.join(other)
    assert cache.batch_size == 1
