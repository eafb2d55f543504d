"""Steps that were made before their forwards: they say what is planned at that moment, and nothing old is used."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from sink_patch import SinkCache
from sink_patch.compat import installed_shim
from sink_patch.errors import CacheStateError
from sink_patch.streaming.bound import streams_of
from sink_patch.streaming.steps import ahead
from sink_patch.streaming.steps.ahead import StepAhead, StepsAhead
from sink_patch.streaming.steps.step import Step
from tests.support import zoo
from tests.support.oracle import worst_error
from tests.support.replay import cache_name
from tests.support.tiny import tiny, tokens

W, S = 12, 3
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7, "num_hidden_layers": 2}


def fed(model: Any, rows: int = 1, seen: int = 2 * W, **sizes: Any) -> SinkCache:
    cache = SinkCache(W, S, model=model, **sizes)
    feed(model, cache, tokens(seen, rows))
    return cache


def feed(model: Any, cache: SinkCache, ids: torch.Tensor, **others: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **{cache_name(model): cache}, **others).logits[:, -1]


def singles(model: Any, cache: SinkCache, count: int, rows: int = 1, seed: int = 1) -> list[torch.Tensor]:
    return [feed(model, cache, token) for token in tokens(count, rows, seed=seed).split(1, dim=1)[:count]]


@pytest.fixture
def made(monkeypatch):
    """The rows for which steps were made, in order."""
    found, make = [], StepsAhead._made_for

    def noted(self, rows, *others):
        steps = make(self, rows, *others)
        found.extend(steps[::-1])
        return steps

    monkeypatch.setattr(StepsAhead, "_made_for", noted)
    return found


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "deepseek_v3", "qwen3_next"])
@pytest.mark.parametrize("rows", [1, 3])
def test_they_say_what_is_planned_then(name, rows, made):
    try:
        model = zoo.build(name, **(SLIDING if name == "gemma3_text" else {}))
    except zoo.CannotBuild as failure:
        pytest.skip(str(failure))
    if (refusal := installed_shim().own_cache(type(model))) is not None:
        pytest.skip(refusal)
    cache = fed(model, rows)
    streams, used = streams_of(cache), []
    begin = streams.forward.begin
    streams.forward.begin = lambda module, step, **others: (
        used.append((streams.rows, step))
        or begin(  # type: ignore[method-assign]
            module, step, **others
        )
    )
    singles(model, cache, 3 * W, rows)
    assert sum(isinstance(step, StepAhead) for _, step in used) > 2 * W
    for held, step in used:
        plans = streams.planner.plan(held, [1] * rows, streams.columns, 1)
        wanted = Step(plans, 1, streams.store.kinds, step.device)
        assert step.plans == wanted.plans
        assert step.sink_turn.rows == wanted.sink_turn.rows
        assert step.past_columns() == wanted.past_columns()
        for one, other in zip(step.layouts, wanted.layouts, strict=True):
            assert type(one) is type(other)
            assert {**vars(one), "slot": None} == {**vars(other), "slot": None}
    assert made


@pytest.mark.parametrize("horizon", [W + 1, 20, 40])
def test_the_clock_is_set_back_in_between(horizon):
    model = tiny("llama", layers=1, max_position_embeddings=horizon)
    text = tokens(6 * W)
    assert worst_error(model, text, [5, *[1] * (6 * W - 5)], W, S) < 1e-5


def test_one_forward_of_sixteen_makes_them(made):
    model = tiny("llama")
    cache = fed(model)
    singles(model, cache, 32)
    assert len(made) == 2 * ahead._AT_ONCE
    singles(model, cache, 1)
    assert len(made) == 3 * ahead._AT_ONCE


def test_none_is_made_where_it_would_be_of_no_use(made, monkeypatch):
    model = tiny("llama")
    singles(model, fed(model, seen=2), W - 3)  # the window fills
    cache = fed(model, 2)
    for _ in range(3):  # rows change their order, as those of beams do
        cache.reorder_cache(torch.tensor([1, 0]))
        singles(model, cache, 1, 2)
    cache = fed(model)
    cache.activate_past_recording()
    singles(model, cache, 3)
    singles(model, fed(model, evict="turns", turn_start=[7]), 3)
    cache = fed(model)
    for token in tokens(3).split(1, dim=1):  # a mask of the caller's must be looked at
        mask = torch.ones(1, cache.get_seq_length() + 1, dtype=torch.long)
        feed(model, cache, token, attention_mask=mask)
    cache, mask = SinkCache(W, S, model=model), torch.ones(2, 2 * W, dtype=torch.long)
    mask[0, :5] = 0  # rows of different lengths, each step of which takes tensors as long as the window
    feed(model, cache, tokens(2 * W, 2), attention_mask=mask)
    singles(model, cache, 3, 2)
    monkeypatch.setattr(ahead, "tensors_last", lambda _: False)  # as while a CUDA graph is recorded
    singles(model, fed(model), 3)
    assert not made


def test_another_batch_size_is_refused_as_ever():
    model = tiny("llama")
    cache = fed(model, 2)
    singles(model, cache, 3, 2)
    with pytest.raises(CacheStateError, match="holds 2 rows, but 1 were fed"):
        singles(model, cache, 1)
    singles(model, cache, 3, 2)


def given_positions(model: Any, look: Callable[[torch.Tensor], Any]) -> Any:
    """Look at the positions of each forward, [1, columns], which some versions hand on by name; a hook to remove."""

    def before(_module: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        look(named["position_ids"] if "position_ids" in named else args[1])

    return model.model.rotary_emb.register_forward_pre_hook(before, with_kwargs=True)


def test_positions_made_in_inference_mode_are_of_no_inference_mode():
    model, found = tiny("llama"), []
    cache = fed(model)
    with given_positions(model, lambda ids: found.append(ids.is_inference())), torch.inference_mode():
        singles(model, cache, 4)
    assert found == [False] * 4


def cropped(cache: SinkCache) -> None:
    with contextlib.suppress(CacheStateError):  # where what has left the window is gone
        cache.crop(-2)


CHANGES = {
    "nothing": lambda model, cache, rows: None,
    "prompt": lambda model, cache, rows: feed(model, cache, tokens(5, rows, seed=3)),
    "reorder": lambda model, cache, rows: cache.reorder_cache(torch.arange(rows).flip(0)),
    "reset": lambda model, cache, rows: (cache.reset(), feed(model, cache, tokens(2 * W, rows, seed=4))),
    "record": lambda model, cache, rows: cache.activate_past_recording(4),
    "stop": lambda model, cache, rows: cache.deactivate_past_recording(),
    "crop": lambda model, cache, rows: cropped(cache),
    "embeddings": lambda model, cache, rows: feed(
        model, cache, None, inputs_embeds=model.get_input_embeddings()(tokens(1, rows, seed=5))
    ),
}


@given(
    steps=st.lists(st.tuples(st.integers(0, 20), st.sampled_from(sorted(CHANGES))), max_size=6),
    rows=st.integers(1, 2),
    horizon=st.sampled_from([W + 5, 64]),
)
@settings(deadline=None, max_examples=30)
def test_whatever_is_done_in_between_the_text_is_the_same_as_without_them(steps, rows, horizon):
    model = tiny("llama", max_position_embeddings=horizon)
    found = []
    for are_made in (True, False):
        cache, logits = SinkCache(W, S, model=model), []
        if not are_made:
            streams_of(cache)._ahead.taken = lambda *_: None  # type: ignore[method-assign]
        logits.append(feed(model, cache, tokens(W + 4, rows)))
        for count, change in steps:
            logits += singles(model, cache, count, rows)
            CHANGES[change](model, cache, rows)
        found.append(torch.stack([*logits, *singles(model, cache, 4, rows)]))
    assert torch.equal(*found)


def test_a_copy_goes_its_own_way():
    model = tiny("llama")
    cache = fed(model)
    singles(model, cache, 5)
    twin = copy.deepcopy(cache)
    assert streams_of(twin)._ahead is not streams_of(cache)._ahead
    ours = singles(model, cache, 20, seed=7)
    singles(model, twin, 3, seed=8)
    again = fed(model)
    singles(model, again, 5)
    assert torch.equal(torch.stack(ours), torch.stack(singles(model, again, 20, seed=7)))


def test_a_forward_that_fails_uses_up_none():
    model = tiny("llama")
    cache, twin = fed(model), fed(model)
    for one in (cache, twin):
        singles(model, one, 3)
    with model.model.layers[0].register_forward_pre_hook(lambda *_: 1 / 0), pytest.raises(ZeroDivisionError):
        singles(model, cache, 1)
    assert torch.equal(torch.stack(singles(model, cache, 20)), torch.stack(singles(model, twin, 20)))


def test_gradients_inference_mode_and_tracers_in_between():
    model = tiny("llama", layers=1)
    cache, twin = fed(model), fed(model)
    text = tokens(40, seed=2).split(1, dim=1)
    for number, token in enumerate(text):
        mode = [torch.no_grad, torch.enable_grad, torch.inference_mode][number // 5 % 3]
        with mode():
            logits = model(token, **{cache_name(model): cache}).logits[:, -1]
        assert torch.equal(logits, feed(model, twin, token))
        assert all(not keys.requires_grad for keys in (layer.keys for layer in cache.layers))
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        for token in text[:3]:
            model(token, **{cache_name(model): cache})
    cache.reset()
    assert worst_error(model, tokens(60), [1] * 60, W, S, cache=cache) < 1e-5


def test_ids_of_a_tracer_are_not_asked_for_their_numbers():
    """A fake tensor says that it is on the CPU."""
    model = tiny("llama")
    cache, fakes = SinkCache(W, S, model=model), FakeTensorMode(allow_non_fake_inputs=True)
    with fakes, torch.no_grad():
        for ids in (tokens(20), tokens(1), tokens(1)):
            model(fakes.from_tensor(ids), **{cache_name(model): cache})
    assert cache.get_seq_length() == 22


def test_each_queue_of_a_device_has_its_own(monkeypatch, made):
    model, queue = tiny("llama"), [0]
    cache = fed(model)
    monkeypatch.setattr(ahead, "queue_of", lambda _: queue[0])
    singles(model, cache, 4)
    assert len(made) == ahead._AT_ONCE
    queue[0] = 1
    singles(model, cache, 1)
    assert len(made) == 2 * ahead._AT_ONCE


def test_what_is_written_into_the_positions_of_a_forward_is_in_no_other():
    """Each forward is given a tensor of its own."""
    model, handed = tiny("llama"), []
    cache, twin = fed(model), fed(model)

    def spoil_the_last(position_ids):
        for old in handed[-1:]:
            old.fill_(0)
        handed.append(position_ids)

    with given_positions(model, spoil_the_last):
        ours = singles(model, cache, 40)
    assert torch.equal(torch.stack(ours), torch.stack(singles(model, twin, 40)))
