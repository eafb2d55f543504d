"""Layers on several devices: what each caches lies where it lies, and nothing goes from one to the other.

Without GPUs the second device is "meta": torch refuses what mixes it with the CPU, on which the first layers compute.
"""

from __future__ import annotations

import copy
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from transformers import CompileConfig

from sink_patch import SinkCache, inspect
from sink_patch.streaming.bound import streams_of
from tests.support.oracle import relative_error
from tests.support.tiny import tiny, tokens

W, S, CONTEXT = 12, 3, 24
SINK = {"cache_implementation": "sink", "window_length": W, "num_sink_tokens": S}
STEPS = {
    "llama": [7, 3, 1, 1, W - S, 1, W, *[1] * CONTEXT],
    "gemma3_text": [7, *[1] * 2 * CONTEXT],  # 4.52 takes no other steps
}
SECOND = ("model.layers.2", "model.layers.3", "model.norm", "lm_head")
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 7},
}


def whole(model_type: str) -> Any:
    """A model of the test's own, proven."""
    settings = {"attention": "sdpa", "max_position_embeddings": CONTEXT, **MODELS[model_type]}
    model = copy.deepcopy(tiny(model_type, layers=4, **settings))
    inspect(model)
    return model


def with_layers_on_meta(model_type: str) -> Any:
    """The first two layers on the CPU, the other two on "meta"; hooks of accelerate move what goes on to them."""
    model = whole(model_type)
    for name in SECOND:
        part = model.get_submodule(name).to("meta")
        add_hook_to_module(part, AlignDevicesHook(execution_device="meta"))
    return model


def devices(cache: SinkCache) -> list[str]:
    return [tensor.device.type for layer in cache.layers for tensor in (layer.keys, layer.values)]


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 4], ids=["rows in step", "rows of different lengths"])
@pytest.mark.parametrize("model_type", MODELS)
def test_each_layer_caches_on_its_own_device(model_type, padding):
    """The window fills, the ring wraps, the clock is set back, rows are chosen and tokens taken back."""
    steps = STEPS[model_type]
    stream, mask = tokens(sum(steps), rows=2), torch.ones(2, sum(steps), dtype=torch.long)
    mask[1, :padding] = 0
    model, one = with_layers_on_meta(model_type), whole(model_type)
    cache, wanted = SinkCache(W, S, model=model), SinkCache(W, S, model=one)
    caches, at = ((model, cache), (one, wanted)), 0
    for step in steps:
        for shared, its in caches:
            shared(stream[:, at : at + step], attention_mask=mask[:, : at + step], past_key_values=its)
        at += step
        assert devices(cache) == ["cpu"] * 4 + ["meta"] * 4
    assert not streams_of(cache).can_be_fixed_now  # one graph has its tensors on one device
    assert streams_of(wanted).can_be_fixed_now
    for _, its in caches:
        its.reorder_cache(torch.tensor([1, 0]))
    copied = cache.clone()
    model(stream[:, :1], past_key_values=copied)
    one(stream[:, :1], past_key_values=wanted)
    assert devices(copied) == ["cpu"] * 4 + ["meta"] * 4
    for layer, other in zip(copied.layers[:2], wanted.layers, strict=False):
        assert relative_error(layer.keys, other.keys) < 1e-6
        assert relative_error(layer.values, other.values) < 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two GPUs")
@pytest.mark.parametrize("model_type", MODELS)
def test_layers_on_two_gpus_give_the_text_of_one(model_type, tmp_path):
    places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1"), 0)
    one = whole(model_type).to("cuda:0")
    two = accelerate.dispatch_model(whole(model_type), device_map=places | dict.fromkeys(SECOND, 1))
    ids, mask = tokens(8, rows=2).to("cuda:0"), torch.ones(2, 8, dtype=torch.long, device="cuda:0")
    mask[1, :5] = 0
    modes = ({}, {"num_beams": 2}, {"compile_config": CompileConfig()}, {"prompt_lookup_num_tokens": 3})
    for mode in modes:
        given = {"inputs": ids[:1]} if "prompt_lookup_num_tokens" in mode else {"inputs": ids, "attention_mask": mask}
        asked = {**SINK, **mode, **given, "max_new_tokens": 4 * W, "do_sample": False, "return_dict_in_generate": True}
        found, wanted = two.generate(**asked), one.generate(**asked)
        assert torch.equal(found.sequences, wanted.sequences)
        assert [layer.keys.device.index for layer in found.past_key_values.layers] == [0, 0, 1, 1]
    found.past_key_values.save(tmp_path / "stream.safetensors")
    loaded, token = SinkCache.load(tmp_path / "stream.safetensors", model=two), ids[:1, :1]
    with torch.no_grad():
        same, other = (two(token, past_key_values=cache).logits for cache in (loaded, found.past_key_values))
    assert torch.equal(same, other)
