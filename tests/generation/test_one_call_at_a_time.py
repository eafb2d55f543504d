"""Two calls of `generate` over one cache: the second is refused, and the first goes on as if it had not been there."""

from __future__ import annotations

import threading

import pytest
import torch

from sink_patch import CacheStateError, SinkCache
from tests.support.tiny import tiny, tokens

ASKED = {"do_sample": False, "max_new_tokens": 30}


@pytest.fixture(scope="module")
def model():
    return tiny("llama", layers=2)


def alone(model):
    return model.generate(tokens(10), past_key_values=SinkCache(24, 4), **ASKED)


@pytest.mark.parametrize("steps", [1, 8, 25])
def test_within_the_other(model, steps):
    cache, refused, count = SinkCache(24, 4, model=model), [], [0]

    def inner(_ids, scores):
        count[0] += 1
        if count[0] == steps:
            with pytest.raises(CacheStateError, match="in the middle of another call over it") as caught:
                model.generate(tokens(5), past_key_values=cache, **ASKED)
            refused.append(caught.value)
        return scores

    found = model.generate(tokens(10), past_key_values=cache, logits_processor=[inner], **ASKED)
    assert refused
    assert torch.equal(found, alone(model))
    more = torch.cat((found, tokens(5)), dim=1)
    assert model.generate(more, past_key_values=cache, **ASKED).shape[1] == more.shape[1] + 30, "the call has ended"


def test_in_another_thread(model):
    cache, found = SinkCache(24, 4, model=model), []
    begun, may_go_on = threading.Event(), threading.Event()

    def wait(_ids, scores):
        begun.set()
        assert may_go_on.wait(60)
        return scores

    asked = {"past_key_values": cache, "logits_processor": [wait], **ASKED}
    thread = threading.Thread(target=lambda: found.append(model.generate(tokens(10), **asked)))
    thread.start()
    assert begun.wait(60)
    try:
        with pytest.raises(CacheStateError, match="in the middle of another call over it"):
            model.generate(tokens(3, seed=5), past_key_values=cache, **ASKED)
    finally:
        may_go_on.set()
        thread.join()
    assert torch.equal(found[0], alone(model))


def test_a_call_that_failed_is_none(model):
    cache = SinkCache(24, 4, model=model)

    def fail(_ids, _scores):
        raise ValueError("of the caller's")

    with pytest.raises(ValueError, match="of the caller's"):
        model.generate(tokens(10), past_key_values=cache, logits_processor=[fail], **ASKED)
    more = tokens(14)
    model.generate(more, past_key_values=cache, **ASKED)
    assert cache.get_seq_length() == 14 + 29
