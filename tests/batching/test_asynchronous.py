"""Asynchronous batching prepares a batch while the one before runs; here on a CPU, where all is done in order."""

from __future__ import annotations

import contextlib
from importlib import import_module

import pytest
import torch

import sink_patch
from tests.batching.cases import model
from tests.batching.serving import Asked, asked, batching, check, config, needs_batching
from tests.batching.talks import blocks_of_cache, keeping
from tests.support.tiny import tokens

pytestmark = needs_batching
SINK = config(16, 3)


class Immediate:
    """A stream, or an event on it, of a device that does everything at once."""

    device = torch.device("cpu")

    def __init__(self, *_: object, **__: object):
        pass

    def synchronize(self, *_: object) -> None:
        pass

    record_event = wait_event = synchronize


@pytest.fixture
def asynchronous(monkeypatch):
    """Lets transformers batch asynchronously without a GPU."""
    place = "transformers.generation.continuous_batching"
    inputs = import_module(f"{place}.input_outputs")
    if not hasattr(inputs, "create_device_stream"):
        pytest.skip("it asks for CUDA by name")
    monkeypatch.setattr(inputs.ContinuousBatchingAsyncIOs, "_supported_device_types", ("cpu",))
    monkeypatch.setattr(inputs, "create_device_stream", Immediate)
    for module in (inputs, import_module(f"{place}.continuous_api"), import_module(f"{place}.model_runner")):
        monkeypatch.setattr(module, "stream_context", lambda _stream: contextlib.nullcontext())
    monkeypatch.setattr(torch, "Event", Immediate)


@pytest.mark.usefixtures("asynchronous")
@pytest.mark.parametrize("name", ["gemma3_text"])
def test_batches_that_are_prepared_ahead(name):
    tested, requests = model(name), asked([(3, 46), (30, 8), (50, 5)])
    sizes = batching(use_async_batching=True, max_batch_tokens=31)
    with tested.continuous_batching_context_manager(SINK, continuous_batching_config=sizes) as manager:
        names = [manager.add_request(one.prompt, max_new_tokens=one.new) for one in requests]
        done = {}
        while len(done) < len(requests):
            if (one := manager.get_result(timeout=1)) is not None:
                done[one.request_id] = one
        pairs, free = manager.batch_processor.inputs_and_outputs.io_pairs, manager.batch_processor.cache
    assert len(pairs) == 2
    assert free.compute_free_capacity() == 1.0
    for one, name_of in zip(requests, names, strict=True):
        check(tested, one, done[name_of], SINK)


@pytest.mark.usefixtures("asynchronous")
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_kept_slots(name):
    """There a request has read its last token when it ends, which is read again with the next turn, as in generate."""
    tested, history, turns, seen = model(name), [], [], []
    wanted, sizes = keeping(16, 3), batching(use_async_batching=True)
    with tested.continuous_batching_context_manager(wanted, continuous_batching_config=sizes) as manager:
        handle = tested.register_forward_pre_hook(
            lambda _module, _args, given: seen.append(given["input_ids"].shape[1]), with_kwargs=True
        )
        try:
            for turn, length in enumerate((9, 30, 7, 12)):
                one = Asked([*history, *tokens(length, seed=turn)[0].tolist()], 10)
                manager.add_request(one.prompt, max_new_tokens=one.new)
                while (result := manager.get_result(timeout=1)) is None:
                    pass
                turns.append((one, result))
                history = [*one.prompt, *result.generated_tokens]
            cache = manager.batch_processor.cache
        finally:
            handle.remove()
    assert blocks_of_cache(cache) == 0
    assert [columns for columns in seen if columns > 1] == [9, 31, 8, 13]
    for one, result in turns:
        check(tested, one, result, wanted)
    sink_patch.kept_streams.clear()
