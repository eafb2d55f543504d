"""One token in a full ring is copied by its index: as by slices, which are taken while gradients are computed."""

from __future__ import annotations

import contextlib

import pytest
import torch

from sink_patch import SinkCache
from sink_patch.buffers import layers
from sink_patch.streaming.bound import streams_of
from tests.support.replay import cache_name
from tests.support.tiny import tiny, tokens

W, S = 8, 2
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}


def logits(model, how, *, grad):
    """Of single tokens, four windows of them; all keys are float32 before `how` applies."""
    cache, text, found = SinkCache(W, S, model=model), tokens(5 * W), []
    with torch.set_grad_enabled(grad):
        model(text[:, :W], **{cache_name(model): cache})
        for number in range(W, 5 * W):
            with how():
                found.append(model(text[:, number : number + 1], **{cache_name(model): cache}).logits.detach())
    return torch.cat(found), cache


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("how", [contextlib.nullcontext, torch.inference_mode, autocast])
@pytest.mark.parametrize(("model_type", "settings"), [("llama", {}), ("gemma3_text", SLIDING)])
def test_a_token_that_is_copied_by_its_index_is_the_same(model_type, settings, how):
    model = tiny(model_type, layers=2, **settings)
    found, cache = logits(model, how, grad=False)
    wanted, other = logits(model, how, grad=True)
    assert torch.equal(found, wanted)
    for one, two in zip(cache.layers, other.layers, strict=True):
        assert torch.equal(one.keys, two.keys)
        assert not two.keys.requires_grad


def test_it_is_copied_so_only_without_gradients_once_the_ring_is_full(monkeypatch):
    slow, model = [], tiny("llama", layers=2)
    update = layers.Ring.update
    monkeypatch.setattr(layers.Ring, "update", lambda ring, *args: slow.append(1) or update(ring, *args))
    cache, text = SinkCache(W, S, model=model), tokens(3 * W)
    for number, grad, copies in [
        (1, False, 4),
        *((1, False, 4),) * (W - 1),
        (1, False, 0),
        (2, False, 4),
        (1, True, 4),
    ]:
        slow.clear()
        seen = streams_of(cache).columns
        with torch.set_grad_enabled(grad):
            model(text[:, seen : seen + number], **{cache_name(model): cache})
        assert len(slow) == copies, seen
