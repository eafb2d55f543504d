"""A model all of whose layers hold states only, of a family whose other models have attention.

transformers itself gives up on such a model in `generate` with its default cache (no layer tells how long the text is).
So the text is compared with that of no cache at all: states forget nothing, whatever the window.
"""

from __future__ import annotations

import pytest
import torch

import sink_patch
from sink_patch import SinkCache
from tests.support import zoo
from tests.support.oracle import relative_error
from tests.support.tiny import tokens

W, S = 12, 3
FAMILIES = ["qwen3_next", "qwen3_5_text"]


def states_only(model_type: str):
    return zoo.build(model_type, num_hidden_layers=1, layer_types=["linear_attention"])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_generation_past_the_window_equals_that_without_a_cache(model_type):
    model, ids = states_only(model_type), tokens(5, rows=2)
    asked = {"max_new_tokens": 3 * W, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    sizes = {"window_length": W, "num_sink_tokens": S}
    found = model.generate(ids, cache_implementation="sink", **sizes, **asked)
    assert torch.equal(found, model.generate(ids, use_cache=False, **asked))
    assert found.shape == (2, 5 + 3 * W)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_logits_of_a_loop_past_the_window_equal_those_of_the_whole_text(model_type):
    model, stream = states_only(model_type), tokens(40)
    cache = SinkCache(W, S, model=model)
    with torch.no_grad():
        wanted = model(stream, use_cache=False).logits
        for start, stop in [(0, 7), *((token, token + 1) for token in range(7, 40))]:
            found = model(stream[:, start:stop], past_key_values=cache).logits[:, -1]
            assert relative_error(found, wanted[:, stop - 1]) < 1e-5
    assert cache.get_seq_length() == 40


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_report_says_what_the_layers_hold(model_type):
    (layer,) = sink_patch.inspect(states_only(model_type), W, S).layers
    assert (layer.adapter, layer.holds) == ("no keys", "its recurrent state, untouched")
