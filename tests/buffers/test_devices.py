"""What is made once for a device and held: right in all threads and modes, and never what a tracer has made."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sink_patch import SinkCache
from sink_patch.buffers import devices
from sink_patch.buffers.devices import made_once, slot_on
from tests.support.oracle import worst_error
from tests.support.replay import cache_name
from tests.support.tiny import tiny, tokens

W, S = 12, 3
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_blocks(monkeypatch):
    monkeypatch.setattr(devices, "_blocks", {})


def in_fakes(model, cache, token):
    with FakeTensorMode(allow_non_fake_inputs=True):
        model(token, **{cache_name(model): cache})


def exported(model, cache, token):
    class Call(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, **{cache_name(model): cache}).logits

    torch.export.export(Call(), (token,), strict=False)


@pytest.mark.parametrize("trace", [in_fakes, exported])
@torch.no_grad()
def test_what_a_tracer_has_made_serves_nobody_else(trace):
    model, other, text = tiny("llama", layers=1), tiny("qwen3", layers=1), tokens(60)
    cache = SinkCache(W, S, model=model)
    model(text[:, :W], **{cache_name(model): cache})
    trace(model, cache, text[:, W : W + 1])
    cache.reset()
    for one, its in ((model, cache), (model, None), (other, None)):
        assert worst_error(one, text, [1] * 60, W, S, cache=its) < 1e-5


def test_slots_are_right_and_of_no_inference_mode():
    for number, slot in enumerate([0, 1, 63, 64, 65, 7, 1_000_000, 64]):
        with torch.inference_mode(number % 2 == 0):
            found = slot_on(CPU, slot)
        assert torch.equal(found, torch.tensor([slot]))
        assert not found.is_inference()
    assert slot_on(None, 3) is None
    assert slot_on(torch.device("meta"), 3) is None


def test_each_stream_of_a_device_has_its_own_and_the_newest_are_held(monkeypatch):
    held, made, queue = {}, [], [0]
    monkeypatch.setattr(devices, "queue_of", lambda _: queue[0])
    make = lambda number, device: made.append((queue[0], number)) or torch.full((1,), number, device=device)  # noqa: E731
    for queue[0] in (0, 1, 0, 1):
        assert made_once(held, CPU, 5, make, most=3) == 5
    assert made == [(0, 5), (1, 5)]
    for number in range(10):
        made_once(held, CPU, number, make, most=3)
    assert [number for *_, number in held] == [7, 8, 9]
