"""Rows that join and leave a running cache: each goes on as it would alone."""

from __future__ import annotations

import copy
import functools
import gc
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters

from sink_patch import SinkCache
from sink_patch.streaming.bound import streams_of
from tests.support import zoo
from tests.support.chats import TURN_START, chat
from tests.support.exact import EXACT, forward
from tests.support.known_gaps import is_newest
from tests.support.naive import NaiveCache
from tests.support.oracle import relative_error
from tests.support.tiny import tiny, tokens

S = 3
CONTEXT = 40  # short, so that the clocks of the rows are set back, at different times
LIFE = 16  # tokens that a row reads behind its prompt, at most
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
built = functools.cache(zoo.build)
MODELS = {
    "llama": (lambda: tiny("llama", layers=2, attention="sdpa", max_position_embeddings=CONTEXT), 8),
    "llama, a window of 32": (MODEL := lambda: tiny("llama", layers=2, max_position_embeddings=CONTEXT), 32),
    "gemma3_text": (lambda: tiny("gemma3_text", layers=2, max_position_embeddings=CONTEXT, **MIXED), 12),
    "gpt_neox": (lambda: tiny("gpt_neox", layers=2, max_position_embeddings=CONTEXT), 11),  # a part of the dims turns
    "bloom": (lambda: built("bloom"), 9),  # biases by the order of keys
    "deepseek_v3": (lambda: built("deepseek_v3"), 10),  # a latent
    "qwen3_next": (lambda: built("qwen3_next"), 12),  # states
    "falcon_h1": (lambda: built("falcon_h1"), 8),  # states and attention in each layer
}
TOLERANCE = 1e-5
TOLERANCE_OF_STATES = 1e-4  # which a batch computes in another order
SOME = settings(
    max_examples=2,
    deadline=None,
    derandomize=not is_newest(),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def model_of(name):
    family = name.split(",", maxsplit=1)[0]
    if family not in EXACT:
        pytest.skip("this transformers cannot stream it")
    return MODELS[name][0]()


def texts(window):
    """(tokens of the prompt, ids [1, tokens]) of each request."""
    lengths = (1, window, 2 * window + 5, 30)
    return [(count, tokens(count + LIFE, seed=count)) for count in lengths]


def begun(model, window, text):
    """A cache that has read the prompt of a text, and the logits behind it, [1, vocab]."""
    (prompt, ids), cache = text, SinkCache(window, S, model=model)
    return cache, forward(model, cache, ids[:, :prompt])


@functools.cache
def logits_alone(name):
    """Of each request alone, [1 + LIFE, vocab]."""
    model, window, found = model_of(name), MODELS[name][1], []
    for text in texts(window):
        cache, first = begun(model, window, text)
        rest = [forward(model, cache, token) for token in text[1][:, text[0] :].split(1, dim=1)]
        found.append(torch.cat([first, *rest]))
    return found


def worst_error(name, seed):
    """Largest relative error of any row in a random server, which has one to four slots."""
    model, window, rng = model_of(name), MODELS[name][1], random.Random(seed)
    wanted, requests, slots, worst = logits_alone(name), texts(window), rng.randint(1, 4), 0.0
    life = [rng.randint(1, LIFE) for _ in requests]
    waiting, rows, cache = rng.sample(range(len(requests)), len(requests)), [], SinkCache(window, S, model=model)
    read = [0] * len(requests)
    while waiting or rows:
        while waiting and len(rows) < slots:
            together = SinkCache(window, S, model=model)  # one that joins may have several rows
            for number in [waiting.pop() for _ in range(min(len(waiting), rng.choice((1, 1, 2))))]:
                alone, logits = begun(model, window, requests[number])
                worst = max(worst, relative_error(logits[0], wanted[number][0]))
                together.join(alone)
                rows.append(number)
            cache.join(together)
        cache = cache.clone() if rng.random() < 0.1 else cache
        places = [requests[number][0] + read[number] for number in rows]
        new = [requests[number][1][:, place] for number, place in zip(rows, places, strict=True)]
        logits = forward(model, cache, torch.stack(new))
        for row, number in enumerate(rows):
            read[number] += 1
            worst = max(worst, relative_error(logits[row], wanted[number][read[number]]))
        stay = [row for row, number in enumerate(rows) if read[number] < life[number]]
        if len(stay) < len(rows):
            rng.shuffle(stay)
            rows = [rows[row] for row in stay]
            cache.batch_select_indices(torch.tensor(stay))
    assert not cache.is_initialized
    assert cache.get_seq_length() == cache.nbytes == 0
    return worst


@pytest.mark.parametrize("name", MODELS)
@given(seed=st.integers(0, 10**6))
@SOME
@torch.no_grad()
def test_each_row_of_a_random_server_equals_the_row_alone(name, seed):
    has_states = name in ("qwen3_next", "falcon_h1")
    assert worst_error(name, seed) <= (TOLERANCE_OF_STATES if has_states else TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@torch.no_grad()
def test_rows_that_joined_equal_the_naive_cache(family):
    window, model = 8, tiny(family, layers=2, max_position_embeddings=CONTEXT)
    cache, naive, requests = SinkCache(window, S, model=model), [], [texts(window)[index] for index in (3, 0, 2)]
    for step in range(LIFE):
        if step % 4 == 0 and len(naive) < len(requests):
            text = requests[len(naive)]
            cache.join(begun(model, window, text)[0])
            naive.append(NaiveCache(model, window, S))
            naive[-1].forward(text[1][:, : text[0]])
        new = tokens(1, rows=len(naive), seed=step)
        logits = forward(model, cache, new)
        for row, one in enumerate(naive):
            assert relative_error(logits[row], one.forward(new[row : row + 1])[0, -1]) < TOLERANCE
    assert max(row.base for row in streams_of(cache).rows) > 0


def continued(model, *caches, steps=3):
    """Logits [steps, rows, vocab] of the rows of all caches, one after the other, fed with the same tokens."""
    new = tokens(steps, seed=77).T[:, None]  # [steps, 1, 1]
    return torch.cat(
        [torch.stack([forward(model, cache, token.expand(cache.batch_size, 1)) for token in new]) for cache in caches],
        dim=1,
    )


def two(model, window=8, **more):
    """Caches of one row and of two, of different lengths."""
    caches = [SinkCache(window, S, model=model, **more) for _ in range(2)]
    forward(model, caches[0], tokens(30, seed=1))
    forward(model, caches[1], tokens(29, rows=2, seed=2))
    return caches


@torch.no_grad()
def test_whole_messages_leave_each_row_by_itself():
    model, asked = MODEL(), {"evict": "turns", "turn_start": TURN_START}
    ids = [torch.tensor([chat(seed, 60, longest=4)]) for seed in range(3)]
    alone = [SinkCache(12, S, model=model, **asked) for _ in ids]
    cache, read = SinkCache(12, S, model=model, **asked), [2, 14, 40]
    for one, text, count in zip(alone, ids, read, strict=True):
        for token in text[:, :count].split(1, dim=1):
            forward(model, one, token)
        cache.join(one)
    assert any(row.dropped for row in streams_of(cache).rows)
    for step in range(20):
        new = [text[:, count + step : count + step + 1] for text, count in zip(ids, read, strict=True)]
        logits = forward(model, cache, torch.cat(new))
        for row, one in enumerate(alone):
            assert relative_error(logits[row], forward(model, one, new[row])[0]) < TOLERANCE
    assert [window.turns for window in cache.window()] == [window.turns for one in alone for window in one.window()]


@pytest.mark.parametrize("records", [(0, 40), (40, 0), (17, 3)], ids=str)
@torch.no_grad()
def test_tokens_of_each_row_are_taken_back_as_far_as_they_were_recorded(records):
    model = MODEL()
    cache, other = caches = two(model)
    for one, count in zip(caches, records, strict=True):
        one.activate_past_recording(count)
        forward(model, one, tokens(5, rows=one.batch_size, seed=count))
    slots = streams_of(other).store.slots
    cache.join(other)
    assert streams_of(cache).recalled == max(records)
    assert streams_of(other).store.slots == slots
    for one in caches:
        one.crop(-5)
    wanted = two(model)
    assert relative_error(continued(model, cache), continued(model, *wanted)) < TOLERANCE
    assert relative_error(continued(model, other), continued(model, two(model)[1])) < TOLERANCE


@torch.no_grad()
def test_whether_the_past_is_recorded_is_said_by_the_cache():
    model = MODEL()
    for which in range(2):
        caches = two(model)
        caches[which].activate_past_recording(40)
        cache, other = caches
        cache.join(other)
        assert cache.is_croppable == (which == 0)
        if which == 0:
            forward(model, cache, tokens(7, rows=3, seed=5))
            cache.crop(-7)
        assert streams_of(cache).store.slots.spare == (48 if which == 0 else 0)
        assert relative_error(continued(model, cache), continued(model, *two(model))) < TOLERANCE


@torch.no_grad()
def test_a_cache_without_rows_takes_those_of_another_and_gives_none():
    model = MODEL()
    cache, other = SinkCache(8, S, model=model), two(model)[1]
    wanted = continued(model, other.clone())
    other.join(cache)
    assert other.batch_size == 2
    cache.join(other)
    cache.batch_select_indices(torch.tensor([]))
    assert (cache.batch_size, cache.nbytes, cache.window()) == (-1, 0, [])
    cache.join(other)
    assert torch.equal(continued(model, cache), wanted)
    other.join(other)
    assert relative_error(continued(model, other), torch.cat((wanted, wanted), dim=1)) < TOLERANCE


@pytest.mark.parametrize("name", ["llama", "qwen3_next"])
@torch.no_grad()
def test_no_tensor_is_shared_and_the_other_cache_goes_on(name):
    """What has joined in inference mode goes on outside of it."""
    model = model_of(name)
    empty = SinkCache(8, S, model=model)
    with torch.inference_mode():
        cache, other = two(model)
        wanted = continued(model, cache.clone(), other.clone())
        for one in (cache, empty):
            one.join(other)
    held = [{tensor.untyped_storage().data_ptr() for tensor in tensors_of(one)} for one in (cache, other, empty)]
    assert min(map(len, held)) > 0
    assert not any(one & another for one, another in ((held[0], held[1]), (held[1], held[2]), (held[0], held[2])))
    with torch.inference_mode():  # outside, states that were made inside cannot be changed
        assert relative_error(continued(model, other), wanted[:, 1:]) < TOLERANCE_OF_STATES
    assert relative_error(continued(model, cache), wanted) < TOLERANCE_OF_STATES
    assert relative_error(continued(model, empty), wanted[:, 1:]) < TOLERANCE_OF_STATES


def tensors_of(cache):
    store = streams_of(cache).store
    rings = [ring for layer in store.sink_layers for ring in layer.rings]
    held = [tensor for ring in rings for tensor in (ring.buffer, ring.pristine)]
    for layer in store.layers:
        for value in vars(layer).values():
            held += value.values() if isinstance(value, dict) else [value]
    return [tensor for tensor in held if isinstance(tensor, torch.Tensor)]


@torch.no_grad()
def test_a_joined_cache_is_saved_and_loaded(tmp_path):
    model = MODEL()
    cache, other = two(model)
    cache.join(other)
    cache.save(tmp_path / "cache")
    loaded = SinkCache.load(tmp_path / "cache", model=model)
    assert cache.window() == loaded.window()
    assert torch.equal(continued(model, cache), continued(model, loaded))


def test_a_call_of_generate_goes_on_in_a_joined_cache():
    """It is given the histories of all rows, padded to the left."""
    model, asked = MODEL(), {"do_sample": False, "max_new_tokens": 30}
    histories, caches = [], []
    for count in (3, 20):
        caches.append(SinkCache(8, S, model=model))
        histories.append(model.generate(tokens(count, seed=count), past_key_values=caches[-1], **asked))
    wanted = [
        model.generate(text, past_key_values=one.clone(), **asked) for text, one in zip(histories, caches, strict=True)
    ]
    caches[0].join(caches[1])
    columns = max(text.shape[1] for text in histories)
    ids, mask = torch.zeros(2, columns, dtype=torch.long), torch.zeros(2, columns, dtype=torch.long)
    for row, text in enumerate(histories):
        ids[row, -text.shape[1] :], mask[row, -text.shape[1] :] = text, 1
    found = model.generate(ids, attention_mask=mask, past_key_values=caches[0], pad_token_id=0, **asked)
    for row, text in enumerate(wanted):
        assert torch.equal(found[row, -text.shape[1] :], text[0])


def test_what_one_row_has_read_as_embeddings_is_not_known_of_the_others():
    model = MODEL()
    cache, other = SinkCache(8, S, model=model), SinkCache(8, S, model=model)
    with torch.no_grad():
        forward(model, cache, tokens(5))
        model(inputs_embeds=model.get_input_embeddings()(tokens(5)), past_key_values=other)
    cache.join(other)
    assert streams_of(cache).history.rows is None
    assert cache.batch_size == 2


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@torch.no_grad()
def test_each_batch_size_is_compiled_once():
    """Rows join and leave, so that each size comes back several times; the graph of each is used again."""
    model, window, found = copy.deepcopy(tiny("llama", attention="sdpa", max_position_embeddings=CONTEXT)), 8, []
    steps = [tokens(1, rows=2, seed=step) for step in range(24)]
    texts_read = [tokens(count, seed=count) for count in (30, 5)]
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, backend="eager", dynamic=False, fullgraph=True)
    for is_compiled in (True, False):
        cache, rows = SinkCache(window, S, model=model), 0
        counters.clear()
        for step, ids in enumerate(steps):
            if step % 3 == 0 and rows < 2:
                cache.join(begun(model, window, (99, texts_read[rows]))[0])
                rows += 1
            elif step % 7 == 6:
                cache.batch_select_indices(torch.arange(rows - 1))
                rows -= 1
            if is_compiled:
                model.forward = compiled
            found.append(forward(model, cache, ids[:rows]))
            vars(model).pop("forward", None)
        assert counters["stats"]["unique_graphs"] == (2 if is_compiled else 0)
    torch._dynamo.reset()
    half = len(found) // 2
    for one, other in zip(found[:half], found[half:], strict=True):
        assert relative_error(one, other) < TOLERANCE


@torch.no_grad()
def test_memory_does_not_grow_with_the_rows_that_have_come_and_gone():
    model, held = MODEL(), []
    cache = SinkCache(8, S, model=model)
    cache.join(begun(model, 8, (9, tokens(9)))[0])
    for step in range(15):
        cache.join(begun(model, 8, (12, tokens(12, seed=step)))[0])
        cache.batch_select_indices(torch.tensor([1]) if step % 2 else torch.tensor([True, False]))
        for token in tokens(2, seed=step).T[:, None]:
            forward(model, cache, token)
        if step % 5 == 4:
            held.append((numbers_held(), cache.nbytes))
    assert held[1] == held[2]


def numbers_held():
    """By all tensors of this process."""
    gc.collect()
    return sum(one.numel() for one in gc.get_objects() if type(one) is torch.Tensor)
