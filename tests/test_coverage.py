"""Every architecture of the installed transformers: exact, with proof, or refused by name with the reason."""

from __future__ import annotations

import pytest
import torch

from sink_patch import SinkCache, UnsupportedModelError
from sink_patch.registry import find_family
from tests.support import zoo
from tests.support.oracle import relative_error, worst_error
from tests.support.replay import replayed
from tests.support.tiny import tokens

TOLERANCE = 1e-5
W, S = 12, 3
STEPS = [7, *[1] * 20, 4, 9, 1, 1, 11, *[1] * 20]

ROOM = {"index_topk": 64, "attention_chunk_size": 64, "floor_scale": 65}


def build(make, *args):
    """With enough of the positions that some may use for a window of ours."""
    model = make(*args)
    config = model.config.get_text_config(decoder=True)
    more = {name: value for name, value in ROOM.items() if hasattr(config, name)}
    return make(*args, **more) if more else model


@pytest.mark.parametrize("model_type", zoo.entries())
def test_verdict(model_type):
    model = build(zoo.build, model_type)
    family = find_family(model.config)
    assert family is not None
    if family.refusal is not None:
        with pytest.raises(UnsupportedModelError, match="cannot stream"):
            SinkCache(model=model)
        return
    stream = tokens(sum(STEPS))
    cache, start = SinkCache(W, S, model=model), 0
    for wanted, new in zip(replayed(model, stream, STEPS, W, S), STEPS, strict=True):
        with torch.no_grad():
            found = model(stream[:, start : start + new], past_key_values=cache, use_cache=True).logits[:, -1]
        assert relative_error(found, wanted) < TOLERANCE, start
        start += new


@pytest.mark.parametrize("model_type", zoo.entries())
def test_oracle(model_type):
    model = zoo.build(model_type)
    family = find_family(model.config)
    if family.refusal: pytest.skip()
    for layer in zoo.layer_types_of(model_type):
        model=build(zoo.one_layer, model_type, layer)
        cache=SinkCache(W,S,model=model)
        if any(not hasattr(l,"kind") or hasattr(l,"conv_states") for l in cache.layers) or len(cache.layers)!=1: pytest.skip("more than one layer "+layer)
        k=cache.layers[0].kind
        stream = tokens(sum(STEPS))
        e=worst_error(model, stream, STEPS, W,S, local_window=k.capacity if k.local else None)
        assert e<TOLERANCE, layer
