"""Each rope type by the one-layer oracle, with horizons within which its frequencies stay those of the keys."""

from __future__ import annotations

import copy

import pytest
import torch

import sink_patch
from sink_patch import SinkArgumentError, SinkCache
from tests.support.oracle import worst_error
from tests.support.tiny import tiny, tokens

THETA = {"rope_theta": 1e4}
SHORT, LONG = [1.0 + 0.1 * pair for pair in range(8)], [4.0 + pair for pair in range(8)]
TYPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 48},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 48,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": SHORT,
        "long_factor": LONG,
        "original_max_position_embeddings": 48,
    },
}
STEPS = [7, 9, 1, 1, 12, *[1] * 90, 20, 5, *[1] * 40]
LIMITED = ("dynamic", "longrope")


def model_of(rope_type, **settings):
    family, longest = (
        ("phi3", 192) if rope_type == "longrope" else ("llama", 192 if "original" in str(TYPES[rope_type]) else 48)
    )
    extra = {"original_max_position_embeddings": 48} if family == "phi3" else {}
    return tiny(
        family, rope_parameters={**THETA, **TYPES[rope_type]}, max_position_embeddings=longest, **extra, **settings
    )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("rope_type", TYPES)
@pytest.mark.parametrize(("window", "sinks"), [(12, 3), (24, 4), (32, 0)])
def test_each_rope_type_is_exact(rope_type, window, sinks, attention):
    model = model_of(rope_type, attention=attention)
    assert worst_error(model, tokens(sum(STEPS)), STEPS, window, sinks) < 1e-5


@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rope_type", TYPES)
def test_a_cast_model_turns_by_the_frequencies_that_it_now_has(rope_type, dtype, used_before):
    model = copy.deepcopy(model_of(rope_type)).to(dtype)
    if used_before:  # long RoPE puts its original frequencies back, which 4.x does not cast
        model(tokens(3))
    found = sink_patch.rope("half")(model)[0].keys.inv_freq
    model(tokens(3))
    assert torch.equal(found, model.model.rotary_emb.inv_freq.double())


def test_an_original_without_values_is_passed_over():
    """transformers 5 leaves a tensor that is no buffer without values, such as those of users' own modules."""
    model = copy.deepcopy(model_of("linear"))
    rotary = model.model.rotary_emb
    vars(rotary)["original_inv_freq"] = rotary.inv_freq.to("meta")
    rotary._buffers.pop("original_inv_freq", None)
    assert torch.equal(sink_patch.rope("half")(model)[0].keys.inv_freq, rotary.inv_freq.double())


@pytest.mark.parametrize("rope_type", TYPES)
def test_the_clock_stays_within_the_original_context(rope_type):
    assert sink_patch.inspect(model_of(rope_type), 24, 4).horizon == 48


@pytest.mark.parametrize("rope_type", LIMITED)
def test_a_window_that_does_not_fit_is_refused_with_what_would(rope_type):
    with pytest.raises(SinkArgumentError, match=f"48 positions.*'{rope_type}'.*window_length=33 or less"):
        SinkCache(34, 3, model=model_of(rope_type))
    assert worst_error(model_of(rope_type), tokens(200), [30, *[1] * 150], 33, 3) < 1e-5


@pytest.mark.parametrize("rope_type", [name for name in TYPES if name not in LIMITED])
def test_a_window_of_most_of_the_context_goes_on_past_it_where_frequencies_stay(rope_type):
    assert sink_patch.inspect(model_of(rope_type), 40, 4).horizon == 80
    assert worst_error(model_of(rope_type), tokens(300), [30, *[1] * 200], 40, 4) < 1e-5
