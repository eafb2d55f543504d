"""One model, several threads: streams are independent, also where both are the first to bind the model."""

from __future__ import annotations

import copy
import functools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from sink_patch import SinkCache
from sink_patch.models.probe import readings
from tests.support.tiny import tiny, tokens

SIZES = [(12, 3), (31, 5)]
TIMEOUT = 30  # seconds that threads wait for each other before a test fails


@pytest.fixture(autouse=True)
def eager_switching() -> Iterator[None]:
    """Switch threads after every few bytecodes, so that races on shared state show."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def model():
    """A model object that no cache has been bound to yet."""
    return copy.deepcopy(tiny("llama", layers=3, max_position_embeddings=64))


def together(work: list[Callable[[], Any]]) -> list[Any]:
    """The results of jobs that start at the same time, each in its own thread."""
    start = threading.Barrier(len(work))

    def run(job: Callable[[], Any]) -> Any:
        start.wait(TIMEOUT)
        return job()

    with ThreadPoolExecutor(len(work)) as pool:
        return list(pool.map(run, work))


def generated(model, window: int, sinks: int, seed: int) -> torch.Tensor:
    """The logits of a stream by `generate` that goes past the window and the model's context: [steps, rows, vocab]."""
    asked = {"cache_implementation": "sink", "window_length": window, "num_sink_tokens": sinks, "do_sample": False}
    wanted = {"max_new_tokens": 100, "return_dict_in_generate": True, "output_logits": True}
    return torch.stack(model.generate(tokens(7, rows=2, seed=seed), **asked, **wanted).logits)


def looped(model, window: int, sinks: int, seed: int) -> torch.Tensor:
    """The logits of a loop over a stream, first in one piece and then token by token: [rows, columns, vocab]."""
    stream, cache = tokens(100, rows=2, seed=seed), SinkCache(window, sinks, model=model)
    pieces = [stream[:, :9], *stream[:, 9:].split(1, dim=1)]
    with torch.no_grad():
        return torch.cat([model(piece, past_key_values=cache).logits for piece in pieces], dim=1)


def jobs(stream: Callable[..., torch.Tensor], model) -> list[Callable[[], torch.Tensor]]:
    return [functools.partial(stream, model, *sizes, seed) for seed, sizes in enumerate(SIZES)]


@pytest.mark.parametrize("stream", [generated, looped])
def test_two_threads_give_the_same_as_each_alone(stream, model):
    alone = [job() for job in jobs(stream, model)]
    for _ in range(2):
        assert all(map(torch.equal, together(jobs(stream, model)), alone))


@pytest.mark.parametrize("stream", [generated, looped])
def test_forwards_at_the_same_time_are_independent(stream, model):
    alone = [job() for job in jobs(stream, model)]
    meeting = threading.Barrier(2)

    def meet(*_: Any) -> None:
        meeting.wait(TIMEOUT)

    for layer in model.model.layers:  # both threads are after the hook of the model, and before the same layer
        layer.register_forward_pre_hook(meet)
    assert all(map(torch.equal, together(jobs(stream, model)), alone))


def test_a_thread_without_a_sink_cache_is_not_changed(model):
    ids = tokens(7)

    def plain() -> torch.Tensor:
        return model.generate(ids, do_sample=False, max_new_tokens=50)

    wanted = plain()
    assert torch.equal(together([plain, lambda: generated(model, 12, 3, 0)])[0], wanted)


def test_a_model_that_two_threads_bind_for_the_first_time_is_right_in_both(model, monkeypatch):
    """Both run the probe: neither waits for the other, as the probe runs code of others."""
    alone = [job() for job in jobs(looped, copy.deepcopy(model))]
    read, meeting = readings.read, threading.Barrier(2)

    def meet(*args: Any, **more: Any) -> Any:
        meeting.wait(TIMEOUT)
        return read(*args, **more)

    monkeypatch.setattr(readings, "read", meet)
    assert all(map(torch.equal, together(jobs(looped, model)), alone))
    assert SinkCache(12, 3, model=model).window_length == 12  # and it has been proven: no probe waits here


def test_the_hooks_are_installed_once_when_two_threads_bind_a_model_for_the_first_time(model):
    for module in (model, model.get_decoder()):
        for name in ("register_forward_pre_hook", "register_forward_hook"):
            register = getattr(module, name)

            def slow(*args: Any, register: Callable[..., Any] = register, **kwargs: Any) -> Any:
                time.sleep(0.05)  # the other thread checks for hooks meanwhile
                return register(*args, **kwargs)

            setattr(module, name, slow)
    together([functools.partial(SinkCache, *sizes, model=model) for sizes in SIZES])
    for module in (model, model.get_decoder()):
        assert len(module._forward_pre_hooks) == len(module._forward_hooks) == 1
