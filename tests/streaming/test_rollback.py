"""`crop` removes the newest tokens, and the tokens that had left the window for them return."""

from __future__ import annotations

import contextlib
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sink_patch import CacheStateError, SinkCache
from tests.support.known_gaps import is_newest
from tests.support.naive import NaiveCache
from tests.support.oracle import relative_error, visible_tokens
from tests.support.tiny import tiny, tokens

W, S = 12, 3
CONTEXT = 48  # short, so that the clock is set back in each stream
TOLERANCE = 1e-5


def take_back(cache, count):
    """`crop` with an argument that has the same meaning in all versions."""
    if count:
        cache.crop(-count)


@torch.no_grad()
def worst_error(model, window, sinks, steps, *, local_window=None, rows=1, margin=0):
    """Largest error of the last logits over forwards; steps: (columns, how many of them are then cropped)."""
    cache = SinkCache(window, sinks, model=model)
    cache.activate_past_recording(margin)
    stream, worst = torch.empty(rows, 0, dtype=torch.long), 0.0
    for number, (columns, rejected) in enumerate(steps):
        seen, new = stream.shape[1], tokens(columns, rows=rows, seed=number)
        stream = torch.cat((stream, new), dim=1)
        found = model(new, past_key_values=cache).logits[:, -1]
        if local_window is not None:
            visible = stream[:, -local_window:]
        else:
            visible = visible_tokens(stream, seen, columns, window, sinks)
        worst = max(worst, relative_error(found, model(visible, use_cache=False).logits[:, -1]))
        take_back(cache, rejected)
        stream = stream[:, : stream.shape[1] - rejected]
    return worst


@st.composite
def drafts(draw):
    window = draw(st.integers(2, 40))
    sinks = draw(st.integers(0, window - 1))
    columns = st.one_of(st.just(1), st.integers(2, 9), st.integers(1, window + 20))
    steps = [(size, draw(st.integers(0, size))) for size in draw(st.lists(columns, min_size=1, max_size=25))]
    return window, sinks, steps


MODELS = {
    "llama": {},
    "cohere": {},
    "gptj": {"n_positions": 96, "n_ctx": 96},
    "falcon": {"alibi": True},
    "mistral": {"sliding_window": 7},
}


@pytest.mark.parametrize("model_type", MODELS)
@given(draft=drafts())
@settings(
    max_examples=60 if is_newest() else 15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_part_of_the_newest_forward_can_be_taken_back(model_type, draft):
    window, sinks, steps = draft
    context = {} if model_type == "gptj" else {"max_position_embeddings": CONTEXT}
    model = tiny(model_type, **context, **MODELS[model_type])
    local = {"local_window": 7} if model_type == "mistral" and window > 7 else {}
    steps = [*steps, *[(1, 0)] * 3]
    assert worst_error(model, window, sinks, steps, **local) <= TOLERANCE


@given(
    window=st.integers(4, 24), draft=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=20)
)
@settings(
    max_examples=60 if is_newest() else 15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_several_forwards_can_be_taken_back_at_once(window, draft):
    """An assistant feeds its draft token by token, for example."""
    model = tiny("llama", max_position_embeddings=CONTEXT)
    steps = [(window + 5, 0)]
    for count, rejected in draft:
        steps += [(1, 0)] * (count - 1) + [(1, min(count, rejected))]
    assert worst_error(model, window, 2, steps, margin=6) <= TOLERANCE


@pytest.mark.parametrize("model_type", ["llama", "gptj"])
def test_a_stream_may_be_taken_back_to_its_sinks_after_its_clock_was_set_back(model_type):
    model = tiny(model_type, **({"max_position_embeddings": 8} if model_type == "llama" else {"n_positions": 8}))
    steps = [*[(1, 0)] * 13, (1, 13), *[(1, 0)] * 9, (1, 9), *[(1, 0)] * 20]  # one token stays, then two
    assert worst_error(model, 4, 2, steps, margin=16) <= TOLERANCE


@pytest.mark.parametrize("columns", [16, 17, 33])
def test_a_long_forward_can_be_taken_back_whole(columns):
    steps = [(30, 0), (columns, columns), (1, 0), (columns, columns - 1), (1, 0)]
    assert worst_error(tiny("llama"), W, S, steps) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_many_layers_equal_the_naive_cache_fed_with_the_same_forwards(model_type):
    types = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 7}
    model = tiny(
        model_type, layers=4, max_position_embeddings=CONTEXT, **(types if model_type == "gemma3_text" else {})
    )
    rng, cache, naive = random.Random(0), SinkCache(W, S, model=model), NaiveCache(model, W, S)
    cache.activate_past_recording()
    for number in range(60):
        new = tokens(rng.choice([1, 1, 4, 6, W + 3]), seed=number)
        found = model(new, past_key_values=cache).logits.double()
        assert relative_error(found, naive.forward(new)) <= TOLERANCE
        rejected = rng.randint(0, new.shape[1])
        take_back(cache, rejected)
        naive.crop(rejected)


@torch.no_grad()
def test_rows_of_different_lengths_are_taken_back_together():
    model = tiny("llama", max_position_embeddings=CONTEXT)
    ids, skipped = tokens(14, rows=2), (0, 9)
    mask = torch.stack([torch.arange(14) >= count for count in skipped]).long()
    cache = SinkCache(W, S, model=model)
    model(ids, attention_mask=mask, past_key_values=cache)
    cache.activate_past_recording()
    streams = [row[count:] for row, count in zip(ids, skipped, strict=True)]
    for number in range(12):
        new = tokens(5, rows=2, seed=number + 1)
        found = model(new, past_key_values=cache).logits[:, -1]
        for row, (stream, its_new) in enumerate(zip(streams, new, strict=True)):
            whole = torch.cat((stream, its_new))[None]
            wanted = model(visible_tokens(whole, len(stream), 5, W, S), use_cache=False).logits[:, -1]
            assert relative_error(found[row : row + 1], wanted) <= TOLERANCE
        take_back(cache, 3)
        streams = [torch.cat((stream, its_new[:2])) for stream, its_new in zip(streams, new, strict=True)]
    assert cache.get_seq_length() == 14 + 12 * 2


@torch.no_grad()
def test_tokens_that_are_gone_cannot_return():
    model, cache = tiny("llama"), SinkCache(W, S)
    with pytest.raises(CacheStateError, match="not bound to a model"):
        cache.activate_past_recording()
    cache.bind(model)
    model(tokens(20), past_key_values=cache)
    cache.activate_past_recording(4)
    assert cache.is_croppable
    with pytest.raises(CacheStateError, match="is gone"):
        cache.crop(-1)  # fed before recording began
    for token in tokens(30).T:
        model(token[None], past_key_values=cache)
    spare = cache.layers[0].kind.spare
    with pytest.raises(CacheStateError, match="is gone"):
        cache.crop(-(spare + 1))
    assert cache.get_seq_length() == 50
    cache.crop(-spare)
    with pytest.raises(CacheStateError, match="is gone"):
        cache.crop(-1)


@torch.no_grad()
def test_a_cache_frees_the_spare_slots_and_continues():
    model, stream = tiny("llama", layers=2), tokens(60)
    cache, plain = (SinkCache(W, S, model=model) for _ in range(2))
    for one in (cache, plain):
        model(stream[:, :30], past_key_values=one)
    size = cache.nbytes
    cache.activate_past_recording()
    model(stream[:, 50:54], past_key_values=cache)
    cache.crop(-4)
    assert cache.nbytes > size
    cache.deactivate_past_recording()
    assert cache.nbytes == size
    assert not cache.is_croppable
    for start in range(30, 50):
        new = stream[:, start : start + 1]
        found, wanted = (model(new, past_key_values=one).logits for one in (cache, plain))
        assert relative_error(found, wanted) <= 1e-6
    with pytest.raises(CacheStateError, match="is gone"):
        cache.crop(-1)


@torch.no_grad()
def test_a_forward_that_fails_while_the_past_is_recorded_overwrites_no_visible_token():
    model, stream = tiny("llama", layers=2), tokens(60)
    cache, plain = (SinkCache(W, S, model=model) for _ in range(2))
    cache.activate_past_recording(16)
    for one, fed in ((cache, 50), (plain, 38)):
        for start in range(fed):
            model(stream[:, start : start + 1], past_key_values=one)
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(stream[:, 50:54], past_key_values=cache)
    handle.remove()
    with pytest.raises(CacheStateError, match="is gone"):
        cache.crop(-13)  # the failed forward has overwritten the oldest of them
    cache.crop(-12)
    for start in range(38, 50):
        found, wanted = (model(stream[:, start : start + 1], past_key_values=one).logits for one in (cache, plain))
        assert relative_error(found, wanted) <= 1e-6


@torch.no_grad()
@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt])
def test_an_unusable_cache_stays_unusable_after_any_call(kind):
    model = tiny("llama", layers=2)
    for call in (
        lambda cache: cache.activate_past_recording(4),
        lambda cache: cache.deactivate_past_recording(),
        lambda cache: cache.crop(-1),
        lambda cache: cache.batch_select_indices(torch.tensor([0])),
    ):
        cache = SinkCache(W, S, model=model)
        model(tokens(30), past_key_values=cache)
        fail_once(model, kind)
        with pytest.raises(kind):
            model(tokens(4), past_key_values=cache)
        with contextlib.suppress(CacheStateError):
            call(cache)
        with pytest.raises(CacheStateError, match=r"failed half-way.*reset\(\)"):
            model(tokens(1), past_key_values=cache)


@torch.no_grad()
def test_after_an_interrupt_only_tokens_that_are_stored_can_be_cropped():
    model = tiny("llama", layers=2)
    cache = SinkCache(W, S, model=model)
    cache.activate_past_recording(16)
    for token in tokens(50).T:
        model(token[None], past_key_values=cache)
    fail_once(model, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        model(tokens(4), past_key_values=cache)
    with pytest.raises(CacheStateError, match="is gone"):
        cache.crop(-13)
    cache.crop(-12)
    assert cache.get_seq_length() == 38


def fail_once(model, kind):
    def fail(*_):
        handle.remove()
        raise kind

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)


@pytest.mark.parametrize("pairing", ["llama", "glm"])
def test_other_sinks_than_those_that_were_taken_back(pairing):
    """Where the buffers stay as they are: what was made of the old sinks is of no use any more."""
    steps = [*((9, 0),) * 8, (9, 80), *((1, 0),) * 40]
    assert worst_error(tiny(pairing, layers=1, max_position_embeddings=CONTEXT), W, S, steps, margin=96) < TOLERANCE
