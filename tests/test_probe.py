"""The probe refuses every kind of wrong adapter, in every precision, and disturbs nothing."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

import sink_patch
from sink_patch import Adapter, AdapterMismatchError, Rotation, SinkCache, binding, no_positions, probe
from sink_patch.adapters import rope
from tests.support.tiny import FAMILIES, tiny, variants


def with_rotation(**changes):
    return lambda adapter: Adapter(keys=dataclasses.replace(adapter.keys, **changes))


def scaled(factor):
    def change(adapter):
        exponents = torch.arange(adapter.keys.inv_freq.numel()) / adapter.keys.inv_freq.numel()
        return Adapter(keys=dataclasses.replace(adapter.keys, inv_freq=adapter.keys.inv_freq * factor**-exponents))

    return change


def of_fewer_dims(adapter):
    return Adapter(keys=dataclasses.replace(adapter.keys, inv_freq=adapter.keys.inv_freq[:-2]))


BREAKS = {
    "wrong pairing": with_rotation(pairing="interleaved"),
    "wrong sign": with_rotation(sign=-1),
    "wrong dim": of_fewer_dims,
    "wrong start": lambda adapter: with_rotation(start=2)(of_fewer_dims(adapter)),
    "past the end of the head": with_rotation(start=2),
    "another theta": scaled(50.0),
    "a theta that is 10 % off": scaled(1.1),
    "no rotation": lambda adapter: no_positions(),
    "values for keys": lambda adapter: Adapter(values=adapter.keys),
    "values beside keys": lambda adapter: Adapter(keys=adapter.keys, values=adapter.keys),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("broken", BREAKS)
def test_a_wrong_adapter_in_one_layer_is_found_and_the_layer_named(broken, dtype, monkeypatch):
    model = copy.deepcopy(tiny("llama", layers=3)).to(dtype)
    model.config.model_type = "mine"

    @sink_patch.register_family("mine")
    def wrong(model):
        first, second, third = rope()(model)
        return [first, BREAKS[broken](second), third]

    with pytest.raises(AdapterMismatchError, match="family 'mine'.*In layer 1 its (keys|values) are off"):
        SinkCache(model=model)
    with pytest.raises(AdapterMismatchError):  # and again: nothing was taken for proven
        sink_patch.inspect(model)


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
    read = probe.read
    monkeypatch.setattr(binding.probe, "read", lambda *args: runs.append(1) or read(*args))
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


def test_error_is_blind_to_no_dim():
    """A key with a few huge dims (biases, as in Qwen2) does not hide what the small ones do."""
    rotation = Rotation(torch.tensor([1.0, 0.3, 0.1, 0.01], dtype=torch.float64))
    before = torch.randn(4, 2, 1, 8)
    before[..., 3] *= 100
    after = rotation.apply(before, rotation.cos_sin(torch.tensor([50]), before.device))
    wrong = dataclasses.replace(rotation, inv_freq=torch.tensor([0.9, 0.3, 0.1, 0.01], dtype=torch.float64))
    assert probe.error((before, after), rotation, 50) < 1e-5
    assert probe.error((before, after), wrong, 50) > 0.05


def test_nothing_is_proven_by_keys_that_are_zero():
    model = copy.deepcopy(tiny("llama"))
    model.model.layers[0].self_attn.k_proj.weight.data.zero_()
    with pytest.raises(AdapterMismatchError, match="off by nan"):
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
        "  clock    positions stay below 192 (trained on 192)",
        "  layers 0 to 1    sliding_attention: keys: half-split rotation of 16 dims; "
        "its own sliding window of 16, no sinks",
        "  layer 2          full_attention: keys: half-split rotation of 16 dims; window of 64 with 4 sinks",
    ]
    assert report.as_dict()["layers"][2]["holds"] == "window of 64 with 4 sinks"
    assert report.horizon == 192
