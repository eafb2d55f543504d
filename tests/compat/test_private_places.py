"""What sink_patch uses of transformers without a guarantee: a release that changes it fails here."""

from __future__ import annotations

import importlib
import inspect
from operator import attrgetter
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig, PretrainedConfig, cache_utils
from transformers.generation.utils import GenerationMixin

from sink_patch import SinkCache
from sink_patch.compat import installed_shim
from sink_patch.compat.models import request, small_manager
from sink_patch.compat.places import BATCHING_ATTRIBUTES
from sink_patch.compat.shim import Place
from tests.support.tiny import tiny

SHIM = installed_shim()


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(inspect.unwrap(function)).parameters)


@pytest.mark.parametrize("method", SHIM.methods, ids=lambda method: f"{method.owner}.{method.name}")
def test_each_wrapped_method_exists_and_has_the_parameters_that_are_read(method):
    try:
        owner = getattr(importlib.import_module(method.module), method.owner)
    except (ImportError, NameError):
        if not method.optional:
            raise
        pytest.skip(f"{method.module} needs packages of a server, or is not there yet")
    assert method.name in vars(owner), "it is inherited or does not exist"
    assert set(method.parameters) <= set(parameters(vars(owner)[method.name]))


@pytest.mark.parametrize("constant", SHIM.constants, ids=lambda constant: constant.name)
def test_each_constant_that_is_added_to_exists(constant):
    held = getattr(importlib.import_module(constant.module), constant.name)
    assert isinstance(held, dict if constant.value is not None else (list, tuple))
    assert constant.entry in held


@pytest.mark.parametrize("place", SHIM.batching, ids=str)
def test_each_place_of_continuous_batching_is_there(place):
    assert place.is_there()


def test_a_place_that_has_moved_is_missed():
    module = "transformers.cache_utils"
    assert Place(module, "DynamicCache", "update", ("key_states", "value_states")).is_there()
    assert not Place(module, "DynamicCache", "update", ("value_states",)).is_there()
    assert not Place(module, "DynamicCache", "updates").is_there()
    assert not Place("transformers.cache_util", "", "update").is_there()


@pytest.mark.skipif(not SHIM.batching, reason="its paged cache takes no sinks")
def test_the_attributes_of_continuous_batching_are_there():
    model = tiny("llama")
    before = model.config._attn_implementation
    manager = small_manager(model, 5)
    try:
        processor = manager._create_batch_processor()
        processor.scheduler.add_waiting_request(request("one", [5, 6, 7]))
        processor.prepare_next_batch()
    finally:
        model.set_attn_implementation(before)
    (future,) = processor.inputs_and_outputs.requests_in_batch
    found = {
        "manager": manager,
        "config": manager.continuous_batching_config,
        "processor": processor,
        "cache": processor.cache,
        "inputs": processor.inputs_and_outputs,
        "allocator": processor.cache.cache_allocators["full_attention"],
        "request": future.state,
        "future request": future,
    }
    assert set(found) == set(BATCHING_ATTRIBUTES)
    for name, attributes in BATCHING_ATTRIBUTES.items():
        for attribute in attributes.split():
            attrgetter(attribute)(found[name])
    inputs = importlib.import_module(type(processor.inputs_and_outputs).__module__)
    assert "self.io_pairs = [" in inspect.getsource(inputs.ContinuousBatchingAsyncIOs)
    assert "self.host_io = " in inspect.getsource(inputs.HostDeviceIOPair)


ASKED = ("update", "get_seq_length", "get_mask_sizes", "get_query_offset", "crop", "reorder_cache", "reset")
"""Calls that models and `generate` make of a cache, by position."""


@pytest.mark.parametrize("name", [name for name in ASKED if hasattr(DynamicCache, name)])
def test_methods_of_the_cache_have_the_parameters_of_transformers(name):
    """The first parameters have the names of transformers' own cache, because callers pass them by position."""
    theirs = getattr(DynamicCache, name)
    asked = [one for one in parameters(theirs) if one not in ("args", "kwargs", "cache_kwargs", "cache_position")]
    if name == "get_mask_sizes":
        asked = parameters(theirs)
    ours = parameters(getattr(SinkCache, name))
    assert ours[: len(asked)] == asked


def test_the_calls_that_each_version_makes_are_among_those_that_are_looked_at():
    """Else the test above would look at nothing, and pass."""
    asked = {name for name in ASKED if hasattr(DynamicCache, name)}
    assert asked >= {"update", "get_seq_length", "crop", "reorder_cache"}


def test_batch_operations_have_the_names_of_transformers():
    for name, asked in (("batch_repeat_interleave", ["repeats"]), ("batch_select_indices", ["indices"])):
        assert parameters(getattr(DynamicCache, name))[1:] == asked
        assert parameters(getattr(SinkCache, name))[1:] == asked


def test_other_names_that_are_read_exist():
    assert "decoder" in parameters(PretrainedConfig.get_text_config)
    assert "assistant_model" in parameters(GenerationConfig.get_generation_mode)
    assert {"strict"} <= set(parameters(GenerationConfig.validate))
    assert callable(GenerationMixin._supports_default_dynamic_cache)
    assert isinstance(nn.Linear(1, 1)._forward_pre_hooks, dict)
    assert "always_call" in parameters(nn.Module.register_forward_hook)
    if hasattr(DynamicCache, "update_indexer"):
        assert parameters(DynamicCache.update_indexer) == parameters(SinkCache.update_indexer)
    if hasattr(cache_utils, "DynamicSlidingWindowLayer"):  # its attribute is read; None would mean full attention
        assert cache_utils.DynamicSlidingWindowLayer(sliding_window=7).sliding_window == 7
    cache = SHIM.probe_cache(PretrainedConfig(num_hidden_layers=1))
    states = torch.ones(1, 1, 2, 4)
    cache.update(states, states, 0)
    assert [pair[0].shape for pair in SHIM.cached(cache)] == [(1, 1, 2, 4)]
