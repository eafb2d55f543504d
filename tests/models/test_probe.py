"""The probe refuses every kind of wrong adapter, in every precision, and disturbs nothing."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

import sink_patch
from sink_patch import Adapter, AdapterMismatchError, Rotation, SinkCache
from sink_patch.models.adapters import rope
from sink_patch.models.probe import readings
from tests.support import zoo
from tests.support.tiny import FAMILIES, tiny, variants


def changed(**changes):
    return lambda rotation: dataclasses.replace(rotation, **changes)


def other_pairing(rotation):
    return dataclasses.replace(rotation, pairing="half" if rotation.pairing == "interleaved" else "interleaved")


def other_theta(factor):
    def change(rotation):
        exponents = torch.arange(rotation.inv_freq.numel()) / rotation.inv_freq.numel()
        return dataclasses.replace(rotation, inv_freq=rotation.inv_freq * factor**-exponents)

    return change


def of_fewer_dims(rotation):
    """Half of the pairs; the last one alone may turn too little to be seen over the context, or to do harm in it."""
    return dataclasses.replace(rotation, inv_freq=rotation.inv_freq[: rotation.inv_freq.numel() // 2])


BREAKS = {
    "wrong pairing": other_pairing,
    "wrong sign": lambda rotation: dataclasses.replace(rotation, sign=-rotation.sign),
    "wrong dim": of_fewer_dims,
    "wrong start": lambda rotation: dataclasses.replace(of_fewer_dims(rotation), start=2),
    "past the end of the head": changed(start=1000),
    "another theta": other_theta(50.0),
    "a theta that is 10 % off": other_theta(1.1),
    "no rotation": lambda rotation: None,
}
# half-split, interleaved, reversed, partial, in the values of a latent cache, and one layer in two without positions
BROKEN = ["llama", "cohere", "nanochat", "gpt_neox", "deepseek_v3", "smollm3"]


def with_two_layers(model_type, dtype):
    model = copy.deepcopy(zoo.build(model_type)).to(dtype)
    assert model.config.num_hidden_layers > 1
    return model


def refuses(model, wrong):
    """The probe finds that the first layer that turns is not `wrong(adapter)`, again and again."""
    family = sink_patch.families()[model.config.model_type]
    right = family.adapters(model)
    broken = next(index for index, adapter in enumerate(right) if adapter.turns)
    model.config.model_type = "mine"
    adapters = [wrong(adapter) if index == broken else adapter for index, adapter in enumerate(right)]
    sink_patch.register_family("mine")(lambda model: adapters)
    for _ in range(2):  # nothing is taken for proven
        with pytest.raises(AdapterMismatchError, match=f"family 'mine'.*In layer {broken} its (keys|values) are off"):
            SinkCache(12, 3, model=model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("broken", BREAKS)
@pytest.mark.parametrize("model_type", BROKEN)
def test_a_wrong_rotation_in_one_layer_is_found_and_the_layer_named(model_type, broken, dtype):
    def wrong(adapter):
        keys, values = (BREAKS[broken](one) if one is not None else None for one in (adapter.keys, adapter.values))
        return Adapter(keys, values)

    refuses(with_two_layers(model_type, dtype), wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", BROKEN)
@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda adapter: Adapter(keys=adapter.values, values=adapter.keys), id="values for keys"),
        pytest.param(lambda adapter: Adapter(*[adapter.keys or adapter.values] * 2), id="values beside keys"),
    ],
)
def test_the_wrong_tensor_is_found(model_type, wrong, dtype):
    refuses(with_two_layers(model_type, dtype), wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_rotation_in_a_layer_without_positions_is_found(dtype):
    model = with_two_layers("smollm3", dtype)
    model.config.model_type = "mine"
    sink_patch.register_family("mine")(rope())
    with pytest.raises(AdapterMismatchError, match="family 'mine'.*In layer 1 its keys are off"):
        SinkCache(12, 3, model=model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_right_adapters_pass_in_low_precision(model_type, dtype):
    for _, config in variants(model_type):
        layers = {"layers": 4} if not {"layer_types", "no_rope_layers"} & set(config) else {}
        model = copy.deepcopy(tiny(model_type, **layers, **config)).to(dtype)
        if model_type in ("gptj", "codegen"):  # their tables are cast with the model, and so the angles: 2^-8 of 1
            continue
        sink_patch.inspect(model)


def test_it_runs_once_for_a_model_and_again_when_its_frequencies_change(monkeypatch):
    model, runs = copy.deepcopy(tiny("llama")), []
    read = readings.read
    monkeypatch.setattr(readings, "read", lambda *args, **more: runs.append(1) or read(*args, **more))
    for _ in range(3):
        SinkCache(model=model)
    assert len(runs) == 1
    model.to(torch.bfloat16)  # rounds inv_freq, too
    SinkCache(model=model)
    assert len(runs) == 2


@pytest.mark.parametrize("training", [False, True])
def test_it_disturbs_neither_the_model_nor_the_random_state(training):
    model = copy.deepcopy(tiny("phi", embd_pdrop=0.3, resid_pdrop=0.3)).train(training)
    weights, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    SinkCache(model=model)
    assert model.training is training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one, weights[name]) for name, one in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_it_costs_two_forwards_of_one_token(monkeypatch):
    model, calls = copy.deepcopy(tiny("llama")), []
    model.model.register_forward_pre_hook(lambda *args: calls.append(args[2]["input_ids"].shape), with_kwargs=True)
    SinkCache(model=model)
    assert len(calls) == 2
    assert {shape[1] for shape in calls} == {1}


def test_a_cast_model_streams_with_the_frequencies_it_now_has():
    model = copy.deepcopy(tiny("llama"))
    SinkCache(model=model)
    model.to(torch.bfloat16)
    cache = SinkCache(12, 3, model=model)
    held = cache.layers[0].rings[0].rotation.inv_freq
    assert torch.equal(held, model.model.rotary_emb.inv_freq.double())


def test_a_cast_model_that_no_family_claims_is_looked_at_again_also_where_its_values_turn():
    model = copy.deepcopy(zoo.build("deepseek_v3"))
    model.config.model_type = "nobody_knows"
    SinkCache(12, 3, model=model)
    model.to(torch.bfloat16)
    rotations = [ring.rotation for ring in SinkCache(12, 3, model=model).layers[0].rings if ring.rotation is not None]
    assert len(rotations) == 1  # of the values; up to 5.14, of the keys
    assert torch.equal(rotations[0].inv_freq, model.model.rotary_emb.inv_freq.double())


def test_error_is_blind_to_no_dim():
    """A key with a few huge dims (biases, as in Qwen2) does not hide what the small ones do."""
    rotation = Rotation(torch.tensor([1.0, 0.3, 0.1, 0.01], dtype=torch.float64))
    before = torch.randn(4, 2, 1, 8)
    before[..., 3] *= 100
    after = rotation.apply(before, rotation.cos_sin(torch.tensor([50]), before.device))
    wrong = dataclasses.replace(rotation, inv_freq=torch.tensor([0.9, 0.3, 0.1, 0.01], dtype=torch.float64))
    assert readings.error((before, after), rotation, 50) < 1e-5
    assert readings.error((before, after), wrong, 50) > 0.05


def test_nothing_is_proven_by_keys_that_are_zero():
    model = copy.deepcopy(tiny("llama"))
    model.model.layers[0].self_attn.k_proj.weight.data.zero_()
    with pytest.raises(AdapterMismatchError, match="off by inf"):
        SinkCache(model=model)


def test_a_report_is_read_by_people_and_programs():
    model = tiny(
        "gemma3_text",
        layers=3,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        sliding_window=16,
    )
    report = sink_patch.inspect(model, 64, 4)
    assert str(report).splitlines() == [
        "Gemma3ForCausalLM (gemma3_text) can stream with attention sinks.",
        "  family   gemma3_text",
        "  window   64 tokens, the first 4 of them for good",
        "  horizon  positions stay below 192 (trained on 192)",
        "  memory   a window of 64: 29.7 kB a row in float32; each token more 256 bytes",
        "  compiled one graph for all tokens, with compile_config",
        "  layers 0 to 1    sliding_attention: keys: half-split rotation of 16 dims; "
        "its own sliding window of 16, no sinks",
        "  layer 2          full_attention: keys: half-split rotation of 16 dims; window of 64 with 4 sinks",
    ]
    assert report.as_dict()["layers"][2]["holds"] == "window of 64 with 4 sinks"
    assert report.horizon == 192
    assert "  compiled never: it takes distances from the order of the keys (ALiBi)" in str(
        sink_patch.inspect(tiny("bloom", layers=1))
    )
