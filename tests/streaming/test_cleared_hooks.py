"""Hooks that somebody has cleared: a forward without the first of ours is refused, and one without the second ends."""

from __future__ import annotations

import copy

import pytest
import torch

from sink_patch import SinkCache, SinkPatchError
from tests.support.oracle import relative_error
from tests.support.replay import cache_name
from tests.support.tiny import tiny, tokens

W, S = 12, 3
PLACES = {"the model": lambda model: [model], "its decoder": lambda model: [model.model]}
PLACES["both"] = lambda model: [model, model.model]


def fed(model, cache, ids, cleared=()):
    logits = []
    for place in range(ids.shape[1]):
        if place == 7:
            for module in cleared:
                module._forward_hooks.clear()
        logits.append(model(ids[:, place : place + 1], **{cache_name(model): cache}).logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("entered", ["the model", "its decoder"])
@torch.no_grad()
def test_forward_hooks(place, entered):
    model, ids = copy.deepcopy(tiny("llama", layers=2)), tokens(30)
    wanted = fed(model, SinkCache(W, S, model=model), ids)
    cache = SinkCache(W, S, model=model)
    if entered == "the model":
        assert relative_error(fed(model, cache, ids, PLACES[place](model)), wanted) < 1e-6
    else:
        for number in range(30):
            if number == 7:
                for module in PLACES[place](model):
                    module._forward_hooks.clear()
            hidden = model.model(ids[:, number : number + 1], **{cache_name(model): cache}).last_hidden_state
        assert relative_error(model.lm_head(hidden), wanted[:, -1:]) < 1e-6
    assert cache.get_seq_length() == 30


@torch.no_grad()
def test_all_of_them():
    model = copy.deepcopy(tiny("llama", layers=2))
    cache = SinkCache(W, S, model=model)
    for module in (model, model.model):
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    with pytest.raises(SinkPatchError):
        model(tokens(5), **{cache_name(model): cache})
