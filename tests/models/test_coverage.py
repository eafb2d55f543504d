"""Every causal language model of the installed transformers: exact, with proof, or refused by name with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sink_patch
from sink_patch import CacheStateError, SinkCache, UnsupportedModelError
from sink_patch.buffers.layers import SinkLayer
from tests.support import zoo
from tests.support.exact import EXACT, VERDICTS, built, forward, with_room
from tests.support.oracle import relative_error, worst_error
from tests.support.replay import replayed
from tests.support.tiny import tokens

ROOT = Path(__file__).parent.parent.parent
TOLERANCE = 1e-5
W, S = 12, 3
STEPS = [7, *[1] * 15, 4, 9, 1, 1, 11, *[1] * 11]  # each run of single tokens goes once around the ring


def steps_of(model_type: str) -> list[int]:
    """A schedule over all rules; single tokens after the first forward where others are refused (see below)."""
    family = sink_patch.families()[model_type]
    return [STEPS[0], *[1] * 36] if family.whole_prompts else STEPS


def test_each_has_a_verdict():
    assert set(VERDICTS) == set(zoo.entries())
    assert all(verdict.exact is not None and verdict.reason for verdict in VERDICTS.values())


@pytest.mark.parametrize("model_type", [model_type for model_type in VERDICTS if model_type not in EXACT])
def test_what_is_refused_is_refused_by_name(model_type):
    model = built(model_type)
    with pytest.raises(UnsupportedModelError, match="cannot stream.*") as caught:
        SinkCache(model=model)
    assert VERDICTS[model_type].reason in str(caught.value) or "encoder-decoder" in str(caught.value)
    assert type(model).__name__ in str(caught.value)


@pytest.mark.parametrize("model_type", EXACT)
def test_what_is_exact_equals_a_naive_cache(model_type):
    """A model with each kind of layer of its family, over all rules."""
    model, steps = built(model_type), steps_of(model_type)
    stream, start = tokens(sum(steps)), 0
    cache = SinkCache(W, S, model=model)
    for wanted, new in zip(replayed(model, stream, steps, W, S), steps, strict=True):
        with torch.no_grad():
            found = forward(model, cache, stream[:, start : start + new])
        assert relative_error(found, wanted) < TOLERANCE, start
        start += new


@pytest.mark.parametrize("model_type", EXACT)
def test_what_is_exact_equals_the_oracle_in_each_kind_of_layer(model_type):
    proven, steps = 0, steps_of(model_type)
    stream = tokens(sum(steps))
    for layer in zoo.layer_types_of(model_type):
        try:
            model = with_room(zoo.one_layer, model_type, layer)
        except zoo.CannotBuild:
            continue  # not without a layer of another kind: the naive cache proves it
        cache = SinkCache(W, S, model=model)
        if len(cache) != 1 or hasattr(cache.layers[0], "conv_states") or not hasattr(cache.layers[0], "kind"):
            continue  # states mix neighbouring tokens
        kind = cache.layers[0].kind
        local = kind.capacity if kind.local else None
        shared = layer.endswith(":shared")
        assert worst_error(model, stream, steps, W, S, local_window=local, use_cache=shared) < TOLERANCE, layer
        proven += 1
    if not proven:
        pytest.skip("the oracle needs a model of one layer of attention; the naive cache proves this family")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", EXACT)
def test_what_is_exact_generates_past_three_windows(model_type, attention):
    if attention == "sdpa" and not type(built(model_type))._supports_sdpa:
        pytest.skip(f"transformers has no sdpa for {model_type}")
    try:
        model = built(model_type, attn_implementation=attention)
    except zoo.CannotBuild as failure:
        if "does not support an attention implementation" not in str(failure):
            raise
        pytest.skip(f"transformers has no sdpa for a part of {model_type}")
    sink = {"cache_implementation": "sink", "window_length": W, "num_sink_tokens": S}
    asked = {"max_new_tokens": 3 * W, "min_new_tokens": 3 * W, "do_sample": True, "return_dict_in_generate": True}
    ids = tokens(5, rows=2)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **asked, **sink)
    assert isinstance(out.past_key_values, SinkCache)
    assert out.sequences.shape == (2, 5 + 3 * W)
    assert out.past_key_values.get_seq_length() == 5 + 3 * W - 1


@pytest.mark.parametrize("model_type", EXACT)
def test_what_is_exact_serves_padded_rows_as_if_alone(model_type):
    model = built(model_type, seed=1)
    stream, mask = tokens(23, rows=2), torch.ones(2, 23, dtype=torch.long)
    mask[1, :5] = 0
    together, *alone = (SinkCache(W, S, model=model) for _ in range(3))
    start = 0
    for new in [9, *[1] * 14]:  # the window is full, and the ring has come round in one row, after 18
        stop = start + new
        with torch.no_grad():
            found = forward(model, together, stream[:, start:stop], attention_mask=mask[:, :stop])
            for row, cache in enumerate(alone):
                real = stream[row, start:stop][mask[row, start:stop].bool()][None]
                assert relative_error(found[row], forward(model, cache, real)[0]) < TOLERANCE, (row, start)
        start = stop


@pytest.mark.parametrize("model_type", EXACT)
def test_states_go_on_from_one_forward_to_the_next_or_it_is_refused(model_type):
    """The naive cache has transformers' own states, so it cannot see that; a fresh forward over the whole text can."""
    model, stream = built(model_type), tokens(15)
    cache = SinkCache(20, S, model=model)
    if all(isinstance(layer, SinkLayer) and not hasattr(layer, "recurrent_states") for layer in cache.layers):
        pytest.skip("no states")
    with torch.no_grad():
        wanted = model(stream, use_cache=False).logits
        forward(model, cache, stream[:, :5])
        if sink_patch.families()[model.config.model_type].whole_prompts:
            with pytest.raises(CacheStateError, match="start anew.*one by one"):
                forward(model, cache, stream[:, 5:10])
        else:
            assert relative_error(forward(model, cache, stream[:, 5:10]), wanted[:, 9]) < 1e-4
            assert cache.get_seq_length() == 10
        for token in range(cache.get_seq_length(), 15):
            assert relative_error(forward(model, cache, stream[:, token : token + 1]), wanted[:, token]) < 1e-4


@pytest.mark.parametrize("model_type", ["gemma3n_text", "gemma4_text"])
def test_windows_are_kept_where_no_layer_shares_the_keys_of_another(model_type):
    """Up to 5.12 `DynamicCache(config)` has no layers at all then, from which windows could be read."""
    model = zoo.build(model_type, num_kv_shared_layers=0)
    kinds = [kind == "sliding_attention" for kind in model.config.layer_types]
    assert SinkCache(W, S, model=model).is_sliding == kinds
    assert True in kinds


@pytest.mark.parametrize("model_type", ["mamba", "jamba"])
def test_a_long_prompt_is_not_cut_where_states_would_start_anew(model_type):
    model, ids = built(model_type), tokens(300)
    plain, sink = (
        model.generate(
            ids, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True, **extra
        )
        for extra in ({}, {"cache_implementation": "sink", "window_length": 299, "num_sink_tokens": S})
    )
    assert relative_error(sink.logits[0], plain.logits[0]) < 1e-5


def test_the_counts_and_the_table_are_those_of_the_readmes():
    proven = [model_type for model_type in EXACT if model_type not in zoo.NOT_BUILT]
    counts = f"{len(VERDICTS)} architectures: {len(proven)} exact, {len(VERDICTS) - len(EXACT)} refused by name"
    print(counts)
    assert len(proven) >= 125
    assert counts in (ROOT / "sink_patch" / "models" / "README.md").read_text().replace("\n", " ")
    assert f"[{len(proven)} of {len(VERDICTS)}]" in (ROOT / "README.md").read_text()
    assert f"{sink_patch.coverage()}\n" == (ROOT / "tests" / "COVERAGE.md").read_text()
