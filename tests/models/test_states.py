"""Recurrent and convolution states, beside attention or alone: they go on from one turn of a chat to the next."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import sink_patch
from sink_patch import CacheStateError, SinkCache
from tests.support import zoo
from tests.support.oracle import relative_error
from tests.support.replay import cache_name
from tests.support.tiny import tokens

MODELS = ["bamba", "falcon_h1", "jamba", "lfm2", "mamba", "mamba2", "qwen3_next"]
SINK = {"cache_implementation": "sink", "window_length": 40, "num_sink_tokens": 3}


def run(model, ids, new, **kwargs):
    asked = {"max_new_tokens": new, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **asked, **kwargs)


@pytest.mark.parametrize("pieces", [{}, {"prefill_chunk_size": 2}], ids=["at once", "in pieces"])
@pytest.mark.parametrize("model_type", MODELS)
def test_a_second_turn_with_the_whole_history_goes_on(model_type, pieces):
    """Within the window, the default cache over the whole text from its start gives the same."""
    model = zoo.build(model_type)
    first = run(model, tokens(5), 4, **SINK)
    cache = first.past_key_values
    history = torch.cat((first.sequences, tokens(5, seed=1)), dim=1)
    resumed = {cache_name(model): cache, **pieces}
    if sink_patch.families()[model_type].whole_prompts and not pieces:
        with pytest.raises(CacheStateError, match="start anew.*one by one"):
            run(model, history, 3, **resumed)
        return
    if sink_patch.families()[model_type].whole_prompts:
        resumed["prefill_chunk_size"] = 1
    second, wanted = run(model, history, 3, **resumed), run(model, history, 3)
    assert torch.equal(second.sequences, wanted.sequences)
    assert cache.get_seq_length() == history.shape[1] + 2
    for found, expected in zip(second.logits, wanted.logits, strict=True):
        assert relative_error(found, expected) < 1e-4


@pytest.mark.parametrize("model_type", MODELS)
def test_a_cache_says_which_layers_hold_states_alone_as_that_of_transformers_does(model_type):
    if not hasattr(DynamicCache, "is_linear"):
        pytest.skip("no cache of this transformers says it")
    model = zoo.build(model_type)
    wanted = DynamicCache(config=model.config).is_linear
    assert SinkCache(40, 3, model=model).is_linear == ([False] * len(wanted) if all(wanted) else wanted)
