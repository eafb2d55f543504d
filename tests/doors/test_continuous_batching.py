"""The doors to continuous batching: each finds what is asked for, and serves it or says why not, before any model runs.

What is served is in tests/batching/.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace

import pytest
from transformers import GenerationConfig

import sink_patch
from sink_patch import SinkCache, SinkPatchError, UnsupportedGenerationError, UnsupportedTransformersError
from sink_patch.batching import service
from sink_patch.compat import installed_shim
from sink_patch.compat.shim import Place, Role
from tests.support.modules import no_module_runs
from tests.support.tiny import tiny, tokens

IDS = [list(range(5, 40))]
SIZES = {"window_length": 12, "num_sink_tokens": 3}
SINK = {"cache_implementation": "sink", **SIZES}


def place(role: Role) -> type:
    """The class of transformers that has a method with this role."""
    method = next(one for one in installed_shim().methods if one.role is role)
    return getattr(import_module(method.module), method.owner)


def plain(**entries) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=8, do_sample=False, **entries)


def manager(model, config: GenerationConfig):
    """As many arguments as it wants: it is refused before it looks at them."""
    made = place(Role.MAKE_MANAGER)
    try:
        return made(model=model, generation_config=config, continuous_batching_config=None)
    except TypeError:
        return made(model=model, generation_config=config)


STORED = {
    "init": lambda model: model.init_continuous_batching(),
    "init, another config": lambda model: model.init_continuous_batching(generation_config=plain()),
    "generate_batch": lambda model: model.generate_batch(IDS),
    "generate_batch, another config": lambda model: model.generate_batch(IDS, generation_config=plain()),
    "generate_batch, by place": lambda model: model.generate_batch(IDS, plain()),
    "manager": lambda model: manager(model, model.generation_config),
    "manager, another config": lambda model: manager(model, plain()),
    "context": lambda model: model.continuous_batching_context_manager(generation_config=plain()).__enter__(),
}
PASSED = {
    "init": lambda model: model.init_continuous_batching(generation_config=plain(**SINK)),
    "generate_batch": lambda model: model.generate_batch(IDS, generation_config=plain(**SINK)),
    "generate_batch, a keyword": lambda model: model.generate_batch(IDS, cache_implementation="sink"),
    "generate_batch, a cache": lambda model: model.generate_batch(IDS, plain(), past_key_values=SinkCache()),
    "manager": lambda model: manager(model, plain(**SINK)),
    "generate, a cache": lambda model: model.generate(
        tokens(6), max_new_tokens=8, cache_implementation="paged", past_key_values=SinkCache()
    ),
}


needs_batching = pytest.mark.skipif(not installed_shim().batching, reason="its paged cache takes no sinks")
OWN_CACHE = [name for name in PASSED if name.endswith("a cache")]


def refused(model, door, error: type[Exception] = SinkPatchError) -> str:
    before, attributes = copy.deepcopy(model.generation_config.to_dict()), set(vars(model))
    with no_module_runs(), pytest.raises(error) as caught:
        door(model)
    assert "paged" in str(caught.value)
    assert model.generation_config.to_dict() == before
    assert set(vars(model)) == attributes
    return str(caught.value)


@pytest.fixture
def model():
    return copy.deepcopy(tiny("llama"))


@pytest.fixture
def old_shim(monkeypatch):
    """As in versions whose paged cache takes no sinks."""
    monkeypatch.setattr(service, "installed_shim", lambda: replace(installed_shim(), batching=()))


def skip_if_there_is_no_such_door(name: str, model) -> None:
    if name.startswith("context") and not hasattr(model, "continuous_batching_context_manager"):
        pytest.skip("it has none")
    if name.startswith("generate,"):
        try:
            GenerationConfig(cache_implementation="paged")
        except ValueError:
            pytest.skip("generate does not go there")


@pytest.mark.usefixtures("old_shim")
@pytest.mark.parametrize("door", STORED)
def test_a_model_that_stores_it_in_older_versions(model, door):
    skip_if_there_is_no_such_door(door, model)
    model.generation_config.update(**SINK)
    assert "Upgrade transformers" in refused(model, STORED[door])


@pytest.mark.usefixtures("old_shim")
@pytest.mark.parametrize("door", PASSED)
def test_a_call_that_asks_for_it_in_older_versions(model, door):
    skip_if_there_is_no_such_door(door, model)
    refused(model, PASSED[door])


@needs_batching
@pytest.mark.parametrize("door", OWN_CACHE)
def test_a_cache_of_the_caller(model, door):
    skip_if_there_is_no_such_door(door, model)
    assert "a SinkCache in past_key_values" in refused(model, PASSED[door])


@needs_batching
@pytest.mark.parametrize("door", STORED)
def test_a_private_place_that_has_moved(model, door, monkeypatch):
    moved = Place("transformers.generation.continuous_batching.scheduler", "Scheduler", "_schedule_requests")
    monkeypatch.setattr(service, "installed_shim", lambda: replace(installed_shim(), batching=(moved,)))
    model.generation_config.update(**SINK)
    assert "has no Scheduler._schedule_requests" in refused(model, STORED[door], UnsupportedTransformersError)


SETTINGS = {
    "evict='turns'": {"evict": "turns", "turn_start": [5]},
    "num_sink_tokens='system'": {"num_sink_tokens": "system", "turn_start": [5], "system_start": [6]},
}


@needs_batching
@pytest.mark.parametrize("door", STORED)
@pytest.mark.parametrize("named", SETTINGS)
def test_settings_that_it_does_not_know(model, door, named):
    model.generation_config.update(**{**SINK, **SETTINGS[named]})
    assert named in refused(model, STORED[door])


def test_sizes_without_the_cache(model):
    with no_module_runs(), pytest.raises(SinkPatchError, match="window_length and num_sink_tokens belong to the sink"):
        model.generate_batch(IDS, plain(), **SIZES)


@pytest.mark.parametrize("door", ["init", "manager"])
def test_nothing_else_is_refused(model, door):
    """They come as far as without us."""
    model.generation_config.eos_token_id = 96
    calls = {"init": model.init_continuous_batching, "manager": lambda: manager(model, plain())}
    results = []
    for switch in (sink_patch.unpatch, sink_patch.patch):
        switch()
        try:
            results.append(type(calls[door]()))
        except Exception as failure:
            results.append(str(failure))
    assert results[0] == results[1]


@pytest.mark.parametrize("batching", [True, False])
@pytest.mark.parametrize("stored", [SINK, {}], ids=["sink", "nothing"])
@pytest.mark.usefixtures("old_shim")
def test_a_server_says_it_at_its_start(model, stored, batching):
    try:
        utils = import_module("transformers.cli.serving.utils")
    except (ImportError, NameError):  # some need the packages of the server for that
        pytest.skip("its server has no handlers, or cannot be imported: a request is refused")
    model.generation_config.update(**stored)
    loaded = SimpleNamespace(loaded_models={"the one that was named": SimpleNamespace(model=model)})
    state = utils.GenerationState(continuous_batching=batching)
    if stored and batching:
        with pytest.raises(UnsupportedGenerationError, match="serve without --continuous-batching"):
            utils.BaseHandler(loaded, state)
    else:
        assert utils.BaseHandler(loaded, state).generation_state is state
