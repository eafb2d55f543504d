"""What a manager does beside decoding: cancelling, forks, the CPU, faults; and what it leaves alone."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import sink_patch
from sink_patch import SinkArgumentError, UnsupportedGenerationError
from sink_patch.batching.managers import service_of
from tests.batching.cases import model
from tests.batching.serving import asked, batching, check, config, driven, generated, needs_batching, served
from tests.batching.talks import keeping

pytestmark = needs_batching
W, S = 16, 3
SINK = config(W, S)


@pytest.fixture(scope="module")
def llama():
    return model("llama")


def test_cancelled_in_the_middle(llama):
    """While its prompt is read, while it is decoded, and while it waits."""
    requests = asked([(30, 12), (5, 20), (9, 20), (30, 20)])
    with driven(llama, SINK, batching(num_blocks=7, max_batch_tokens=31)) as manager:
        names = [manager.add(one) for one in requests]
        late = [name for name in names if name != names[0]]
        manager.run(lambda number: manager.manager.cancel_request(late[number // 3]) if number in (0, 3, 6) else None)
        assert manager.free == 1.0
    assert set(manager.done) == {names[0]}
    check(llama, requests[0], manager.done[names[0]], SINK)


@pytest.mark.parametrize("prompt", [1, 10, 30], ids=["one token", "within the window", "longer"])
def test_several_texts_for_one_prompt(llama, prompt):
    (request,) = asked([(prompt, 20)])
    wanted = config(W, S)
    wanted.num_return_sequences = 3
    with driven(llama, wanted, batching()) as manager:
        name = manager.add(request)
        done = manager.run()
        assert manager.free == 1.0
    assert set(done) == {name, f"{name}__child#0", f"{name}__child#1"}
    for result in done.values():
        check(llama, request, result, SINK)
        assert len(result.prompt_ids) == prompt


@pytest.mark.parametrize("refused", [{"num_blocks": 2, "page_size": 4}, {"max_batch_tokens": 8}], ids=["room", "batch"])
def test_several_texts_for_a_prompt_that_is_refused(llama, refused):
    """Who waits for all of them hears of all."""
    (request,) = asked([(30, 20)])
    wanted = config(W, S)
    wanted.num_return_sequences = 3
    with driven(llama, wanted, batching(**refused)) as manager:
        name = manager.add(request)
        done = manager.run()
        assert manager.free == 1.0
    assert set(done) == {name, f"{name}__child#0", f"{name}__child#1"}
    assert all(result.error for result in done.values())


@pytest.mark.parametrize("prompt", [10, 30], ids=["within the window", "longer"])
def test_several_texts_for_a_prompt_are_cancelled_together(llama, prompt):
    wanted = config(W, S)
    wanted.num_return_sequences = 3
    with driven(llama, wanted, batching()) as manager:
        manager.manager.cancel_request(manager.add(*asked([(prompt, 20)])))
        assert manager.run() == {}
        assert manager.free == 1.0


@pytest.mark.parametrize("space", [0.01, 0.0], ids=["to the CPU and back", "begun anew"])
@pytest.mark.parametrize("name", ["gemma3_text"])
def test_pages_that_are_taken_away(name, space, monkeypatch):
    """It never happens by itself, as requests have all their pages when they are let in."""
    tested, requests = model(name), asked([(5, 10), (30, 30), (9, 36)])
    if space:  # pinned memory needs a GPU
        empty = torch.empty

        def pageable(*sizes: int, pin_memory: bool = False, **named: Any) -> torch.Tensor:
            return empty(*sizes, **named)

        monkeypatch.setattr(torch, "empty", pageable)
    with driven(tested, SINK, batching(cpu_offload_space=space)) as manager:
        names = [manager.add(one) for one in requests]
        cache, scheduler = manager.processor.cache, manager.processor.scheduler

        def take_away(number: int) -> None:
            if number in (4, 25):
                active = list(scheduler.active_requests.values())
                scheduler.starved_requests = [(state, 1) for state in active[1:]]
                with monkeypatch.context() as patched:
                    patched.setattr(cache, "count_storable_requests", lambda _needed: -1)
                    assert manager.processor.offloading_manager.offload_requests()
                assert {state.is_cpu_offloaded for state in scheduler.waiting_requests.values()} == {bool(space)}

        manager.run(take_away)
        assert manager.free == 1.0
    for one, name_of in zip(requests, names, strict=True):
        check(tested, one, manager.done[name_of], SINK)


@pytest.mark.parametrize("blocks", [6, 9, 20])
def test_as_many_are_let_in_as_fit(llama, blocks):
    """Two blocks of eight tokens for a window, one for a short text; they run beside each other from the start."""
    requests = asked([(3, 20)] * 4 + [(3, 3)] * 2)
    with driven(llama, SINK, batching(num_blocks=blocks)) as manager:
        for one in requests:
            manager.add(one)
        manager.step()
        there = {name for one in manager.processor.cache.cache_allocators.values() for name in one.block_table}
        assert len(there) == {6: 3, 9: 5, 20: 6}[blocks]
        manager.run()
        assert len(manager.done) == 6
        assert all(one.error is None for one in manager.done.values())


def test_too_little_room_for_one_of_them(llama):
    """It is refused by itself; the others are served."""
    requests = asked([(20, 30), (4, 3), (38, 2)])
    with driven(llama, SINK, batching(num_blocks=1, max_batch_tokens=30)) as manager:
        names = [manager.add(one) for one in requests]
        manager.run()
    assert "Raise num_blocks" in manager.done[names[0]].error
    check(llama, requests[1], manager.done[names[1]], SINK)
    assert "Raise that, or let prompts go in by pieces: prefill_chunk_size=13" in manager.done[names[2]].error
    with pytest.raises(SinkArgumentError, match="max_batch_tokens=30"):
        llama.generate_batch([requests[2].prompt], SINK, batching(max_batch_tokens=30))


def test_a_long_piece_goes_in_beside_many_short_texts(llama):
    """It is not put off for as long as there are others."""
    requests = asked([(3, 40)] * 6 + [(37, 2)])
    with driven(llama, SINK, batching(max_batch_tokens=38)) as manager:
        names = [manager.add(one) for one in requests]
        order: list[str] = []
        manager.run(lambda _number: order.extend(name for name in manager.done if name not in order))
    assert order[0] == names[-1]
    for one, name in zip(requests, names, strict=True):
        check(llama, one, manager.done[name], SINK)


def test_an_exception_in_a_batch(llama):
    """All requests end with it, with what they have so far; nothing is left in the cache."""
    requests, calls = asked([(5, 30), (20, 30)]), SimpleNamespace(left=12)

    def fail(*_: object) -> None:
        calls.left -= 1
        if calls.left == 0:
            raise RuntimeError("of a test")

    handle, done = None, {}
    manager = llama.init_continuous_batching(generation_config=SINK, continuous_batching_config=batching())
    try:
        names = [manager.add_request(one.prompt, max_new_tokens=one.new) for one in requests]
        handle = llama.model.layers[1].mlp.register_forward_pre_hook(fail)
        manager.start()
        manager._generation_thread.join(60)
        processor = manager.batch_processor
        while not manager.output_router.output_queue.empty():
            result = manager.output_router.output_queue.get()
            done[result.request_id] = result
    finally:
        if handle is not None:
            handle.remove()
        manager.stop(block=True)
    for one, name in zip(requests, names, strict=True):
        assert "of a test" in done[name].error
        some = done[name].generated_tokens
        assert 5 < len(some) < 30
        assert generated(llama, one, SINK)[0][: len(some)] == some
    assert processor.cache.compute_free_capacity() == 1.0


OPTIONS = {
    "max_blocks_per_request": {"max_blocks_per_request": 4},
    "prefill_first": {"scheduler_type": "prefill_first"},
    "a safety margin": {"safety_margin": 0.4, "num_blocks": 9},
    "few requests in a batch": {"max_requests_per_batch": 2},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_the_manager(llama, name):
    requests = asked([(20, 12), (20, 12), (5, 20)])
    requests[1].prompt[:] = requests[0].prompt  # no pages are shared
    for one, result in zip(requests, served(llama, requests, SINK, batching(**OPTIONS[name])), strict=True):
        check(llama, one, result, SINK)


def test_doors(llama):
    """`generate_batch` with keywords, with a config and with what the model stores, and a context with a thread."""
    requests = asked([(20, 12), (5, 20)])
    prompts, sizes = [one.prompt for one in requests], {"window_length": W, "num_sink_tokens": S}
    wanted = [generated(llama, one, SINK)[0][:12] for one in requests]
    plain = config(W, S, max_length=None)
    plain.cache_implementation = plain.cache_config = None
    before, attributes = llama.generation_config.to_dict(), set(vars(llama))
    quick = {"continuous_batching_config": batching(), "max_new_tokens": 12}
    given = [
        llama.generate_batch(prompts, plain, cache_implementation="sink", **sizes, **quick),
        llama.generate_batch(prompts, SINK, **quick),
    ]
    llama.generation_config.update(cache_implementation="sink", cache_config=sizes)
    try:
        given.append(llama.generate_batch(prompts, plain, **quick))
        with llama.continuous_batching_context_manager(plain, continuous_batching_config=batching()) as manager:
            names = manager.add_requests(prompts, max_new_tokens=12)
            results = {}
            while len(results) < 2:
                one = manager.get_result(timeout=1)
                results.update({} if one is None else {one.request_id: one})
            given.append({name: results[name] for name in names})
        others = llama.generate_batch(prompts, plain, cache_implementation="paged", **quick)
    finally:
        llama.generation_config.cache_implementation = llama.generation_config.cache_config = None
    for one in given:
        assert [result.generated_tokens for result in one.values()] == wanted
    assert [result.generated_tokens for result in others.values()] != wanted
    assert (llama.generation_config.to_dict(), set(vars(llama))) == (before, attributes)


def test_a_kept_manager_serves_as_it_was_made(llama):
    requests = asked([(20, 12)])
    results = llama.generate_batch([requests[0].prompt], SINK, batching(), persistent_manager=True, max_new_tokens=12)
    try:
        check(llama, requests[0], *results.values(), SINK)
        again = llama.generate_batch([requests[0].prompt], SINK, persistent_manager=True, max_new_tokens=12)
        check(llama, requests[0], *again.values(), SINK)
        for other in (config(W + 1, S), config(W, S, prefill_chunk_size=5), keeping(W, S)):
            with pytest.raises(UnsupportedGenerationError, match="destroy_cached_continuous_batching_manager"):
                llama.init_continuous_batching(other)
        plain = config(W, S)
        plain.cache_implementation = None
        with pytest.raises(UnsupportedGenerationError, match="with no sinks"):
            llama.init_continuous_batching(plain)
    finally:
        llama.destroy_cached_continuous_batching_manager()


def test_unpatched_in_between(llama):
    """What was made goes on; what is made then is as without us, and so are those that did not ask."""
    requests = asked([(20, 30)])
    with driven(llama, SINK, batching()) as manager:
        sink_patch.unpatch()
        try:
            name = manager.add(requests[0])
            manager.run()
        finally:
            sink_patch.patch()
    check(llama, requests[0], manager.done[name], SINK)
    sink_patch.unpatch()
    try:
        with driven(llama, SINK, batching()) as plain:
            other = plain.add(requests[0])
            plain.run()
    finally:
        sink_patch.patch()
    assert service_of(plain.manager) is None
    assert plain.done[other].generated_tokens != manager.done[name].generated_tokens
    unasked = config(W, S)
    unasked.cache_implementation = unasked.cache_config = None
    with driven(llama, unasked, batching()) as untouched:
        objects = (untouched.manager, untouched.processor, untouched.processor.cache, untouched.processor.scheduler)
        assert not [one for one in objects if "SinkP" in repr(vars(one)) or "sink_patch" in repr(list(vars(one)))]


def test_nothing_holds_what_has_ended(llama):
    with driven(llama, SINK, batching()) as manager:
        manager.add(asked([(20, 30)])[0])
        manager.run()
        processor = weakref.ref(manager.processor)
        manager.manager.batch_processor = manager.processor = None
    gc.collect()
    assert processor() is None
