"""Calls that are allowed only between two forwards raise during a forward, which is not disturbed by them."""

from __future__ import annotations

import copy
import importlib.util
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CompileConfig

from sink_patch import CacheStateError, SinkCache
from sink_patch.streaming import forward
from tests.support.oracle import relative_error
from tests.support.replay import cache_name
from tests.support.tiny import tiny, tokens

W, S = 12, 3
BETWEEN_FORWARDS: dict[str, Callable[[SinkCache, Any], object]] = {
    "crop": lambda cache, path: cache.crop(-1),
    "crop of nothing": lambda cache, path: cache._take_back(0, "0"),  # the meaning of crop(0) depends on the version
    "reset": lambda cache, path: cache.reset(),
    "reorder_cache": lambda cache, path: cache.reorder_cache(torch.tensor([0])),
    "batch_select_indices": lambda cache, path: cache.batch_select_indices(torch.tensor([0])),
    "batch_repeat_interleave": lambda cache, path: cache.batch_repeat_interleave(1),
    "join": lambda cache, path: cache.join(cache),
    "activate_past_recording": lambda cache, path: cache.activate_past_recording(),
    "deactivate_past_recording": lambda cache, path: cache.deactivate_past_recording(),
    "clone": lambda cache, path: cache.clone(),
    "save": lambda cache, path: cache.save(path / "cache"),
}
PLACES = {"before anything is stored": "embed_tokens", "between": "layers.0.mlp", "when all is stored": "layers.1.mlp"}


def model() -> Any:
    return tiny("llama", layers=2, max_position_embeddings=64)


def calling_once(module: nn.Module, call: Callable[[], object], found: list[str]) -> Any:
    """Register a hook that calls `call` once and records the error in `found`."""

    def hook(*_: Any) -> None:
        if not found:
            found.append("nothing was raised")
            try:
                call()
            except CacheStateError as refusal:
                found[0] = str(refusal)

    return module.register_forward_pre_hook(hook)


def feed(one: Any, cache: SinkCache, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return one(ids, **{cache_name(one): cache}).logits


@pytest.mark.parametrize("fed", [5, 20], ids=["window not full", "window full"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", BETWEEN_FORWARDS)
def test_each_call_raises_and_the_forward_continues(name, place, fed, tmp_path):
    one, stream = model(), tokens(30)
    cache, undisturbed = (SinkCache(W, S, model=one) for _ in range(2))
    for each in (cache, undisturbed):
        feed(one, each, stream[:, :fed])
    found: list[str] = []
    handle = calling_once(
        one.model.get_submodule(PLACES[place]), lambda: BETWEEN_FORWARDS[name](cache, tmp_path), found
    )
    for start, stop in ((fed, fed + 2), (fed + 2, fed + 3), (fed + 3, fed + 4)):
        logits, wanted = (feed(one, each, stream[:, start:stop]) for each in (cache, undisturbed))
        assert torch.equal(logits, wanted)
        assert cache.get_seq_length() == stop
    handle.remove()
    assert "in the middle of a forward" in found[0]


@pytest.mark.parametrize("name", BETWEEN_FORWARDS)
def test_each_call_raises_in_generate(name, tmp_path):
    one, ids, found = model(), tokens(6), []
    cache = SinkCache(W, S, model=one)
    asked = {"max_new_tokens": 20, "do_sample": False}
    handle = calling_once(one.model.layers[1].mlp, lambda: BETWEEN_FORWARDS[name](cache, tmp_path), found)
    text = one.generate(ids, past_key_values=cache, **asked)
    handle.remove()
    assert "in the middle of a forward" in found[0]
    assert torch.equal(text, one.generate(ids, past_key_values=SinkCache(W, S), **asked))


def test_a_call_from_another_thread_raises():
    """A check of the stack frames of one thread alone would take the forward for an interrupted one."""
    one, stream, found = model(), tokens(12), []
    cache = SinkCache(W, S, model=one)
    feed(one, cache, stream[:, :5])

    def elsewhere() -> None:
        thread = threading.Thread(target=lambda: found.append(error_of(cache.reset)))
        thread.start()
        thread.join()

    handle = one.model.layers[0].mlp.register_forward_pre_hook(lambda *_: elsewhere())
    feed(one, cache, stream[:, 5:7])
    handle.remove()
    assert "in the middle of a forward" in found[0]
    assert cache.get_seq_length() == 7


def error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except CacheStateError as refusal:
        return str(refusal)
    return "nothing was raised"


def test_a_call_raises_in_compiled_decoding():
    shared = tiny("llama", layers=2, attention="sdpa", max_position_embeddings=64)
    one, ids, found = copy.deepcopy(shared), tokens(6), []
    cache = SinkCache(W, S, model=one)
    config = CompileConfig(backend="eager", mode=None, fullgraph=False, dynamic=False)
    config._compile_all_devices = True
    handle = one.model.norm.register_forward_pre_hook(
        torch.compiler.disable(lambda *_: found.append(error_of(cache.reset)))
    )
    torch._dynamo.reset()
    asked = {"max_new_tokens": 6, "do_sample": False}
    text = one.generate(ids, past_key_values=cache, compile_config=config, **asked)
    handle.remove()
    torch._dynamo.reset()
    assert found
    assert all("in the middle of a forward" in each for each in found)
    assert torch.equal(text, one.generate(ids, past_key_values=SinkCache(W, S), **asked))


@pytest.mark.parametrize("entry", ["the model", "its decoder"])
def test_a_forward_inside_a_forward_raises(entry):
    """Its tokens would overwrite those that the outer forward is storing."""
    one, stream, found = model(), tokens(30), []
    cache, undisturbed = (SinkCache(W, S, model=one) for _ in range(2))
    for each in (cache, undisturbed):
        feed(one, each, stream[:, :20])
    called = one if entry == "the model" else one.model
    with torch.no_grad():
        call = {"input_ids": stream[:, 20:21], cache_name(called): cache}
        handle = calling_once(one.model.layers[0].mlp, lambda: called(**call), found)
        logits = feed(one, cache, stream[:, 20:22])
        handle.remove()
    assert "in the middle of a forward" in found[0]
    assert torch.equal(logits, feed(one, undisturbed, stream[:, 20:22]))
    assert relative_error(feed(one, cache, stream[:, 22:23]), feed(one, undisturbed, stream[:, 22:23])) == 0


def test_whether_a_plain_forward_is_under_way_is_known_without_looking_at_the_stack(monkeypatch):
    """That takes as long as to store some layers, and the decoder is given what was made for the forward."""
    if importlib.util.find_spec("transformers.masking_utils") is None:
        pytest.skip("models of this transformers make their masks themselves, and ask the cache for its length")
    one, stream, looked = model(), tokens(30), []
    cache, count = SinkCache(W, S, model=one), forward._calls_on_the_stack
    feed(one, cache, stream[:, :20])
    monkeypatch.setattr(
        forward, "_calls_on_the_stack", lambda *args, **named: looked.append(1) or count(*args, **named)
    )
    for column in range(20, 30):
        feed(one, cache, stream[:, column : column + 1])
    assert not looked


@pytest.mark.parametrize("given", ["the same", "equal", "none"])
@pytest.mark.parametrize("fed", [5, 20], ids=["window not full", "window full"])
@pytest.mark.parametrize("place", ["embed_tokens", "layers.0"])
@torch.no_grad()
def test_after_an_interrupt_positions_of_the_forward_do_not_tell_that_it_goes_on(place, fed, given):
    """Somebody has kept them, and calls the decoder again, which begins a forward of its own."""
    one, stream, kept = model(), tokens(30), []
    cache, undisturbed = (SinkCache(W, S, model=one) for _ in range(2))
    for each in (cache, undisturbed):
        feed(one, each, stream[:, :fed])

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handles = [
        one.model.register_forward_pre_hook(
            lambda _, args, named: kept.append(named["position_ids"]), with_kwargs=True, prepend=True
        ),
        one.model.get_submodule(place).register_forward_pre_hook(interrupt),
    ]
    with pytest.raises(KeyboardInterrupt):
        feed(one, cache, stream[:, fed : fed + 1])
    for handle in handles:
        handle.remove()
    positions = {"the same": kept[0], "equal": kept[0].clone(), "none": None}[given]
    name = cache_name(one.model)
    found = one.model(stream[:, fed : fed + 1], position_ids=positions, **{name: cache}).last_hidden_state
    wanted = one.model(stream[:, fed : fed + 1], **{name: undisturbed}).last_hidden_state
    assert torch.equal(found, wanted)
    assert cache.get_seq_length() == fed + 1
    for column in range(fed + 1, 30):
        logits, other = (feed(one, each, stream[:, column : column + 1]) for each in (cache, undisturbed))
        assert torch.equal(logits, other)


@pytest.mark.parametrize("name", ["the first", "a later one"])
def test_a_layer_that_stores_other_columns_than_the_forward_has_is_refused(name):
    one, stream = model(), tokens(30)
    cache = SinkCache(W, S, model=one)
    if name == "a later one":
        feed(one, cache, stream[:, :20])
    store = cache.update
    cache.update = (
        lambda key_states, value_states, *rest, **named: store(  # as of a layer that adds a token of its own
            torch.cat((key_states, key_states[:, :, :1]), dim=2),
            torch.cat((value_states, value_states[:, :, :1]), dim=2),
            *rest,
            **named,
        )
    )
    with pytest.raises(CacheStateError, match="has 2 tokens in a forward of 1"):
        feed(one, cache, stream[:, 20:21])


@pytest.mark.parametrize("name", BETWEEN_FORWARDS)
def test_after_an_interrupt_each_call_works(name, tmp_path):
    """No hook runs after an interrupt, so the forward still counts as in progress; the next call must notice."""
    one, stream = model(), tokens(30)
    cache = SinkCache(W, S, model=one)
    feed(one, cache, stream[:, :5])

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = one.model.layers[0].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        feed(one, cache, stream[:, 5:7])
    handle.remove()
    if name == "crop":
        cache.activate_past_recording()
    BETWEEN_FORWARDS[name](cache, tmp_path)  # no token was overwritten
    assert cache.get_seq_length() == {"reset": 0, "crop": 4}.get(name, 5)
