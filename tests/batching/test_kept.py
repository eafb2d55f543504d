"""Slots of requests that have ended are kept: a turn of a talk costs its new tokens, and says what `generate` says."""

from __future__ import annotations

import copy
from typing import Any

import pytest

import sink_patch
from sink_patch.batching.slots.room import SinkRoom
from tests.batching.cases import model
from tests.batching.serving import Asked, Driven, asked, batching, check, config, driven, needs_batching
from tests.batching.talks import blocks_of, check_talks, hold, keeping, talks
from tests.support.tiny import tokens

pytestmark = needs_batching
W, S = 16, 3
KEEP = keeping(W, S)


@pytest.fixture(scope="module")
def llama():
    return model("llama")


@pytest.fixture(autouse=True)
def nothing_kept():
    yield
    sink_patch.kept_streams.clear()


def ids(length: int, seed: int) -> list[int]:
    return tokens(length, seed=seed)[0].tolist()


def ask(manager: Driven, *requests: Asked) -> list[tuple[Any, int]]:
    """What comes for requests that are there at once, and how many tokens of each prompt were read."""
    names = [manager.add(one) for one in requests]
    manager.run()
    return [(manager.done[name], manager.read[name] - one.new + 1) for name, one in zip(names, requests, strict=True)]


def longer(one: Asked, result: Any, length: int, seed: int, new: int = 9) -> Asked:
    """The next turn, with a message of so many tokens."""
    return Asked([*one.prompt, *result.generated_tokens, *ids(length, seed)], new)


@pytest.mark.parametrize("strips", [0, 4], ids=["as they were", "written anew"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_talks_at_once(name, strips):
    """Past three windows and the end of the context; answers are repeated as they were, or without their beginning."""
    tested, users = model(name), talks(3, 5, seed=strips, least=6, strips=strips)
    with driven(tested, KEEP, batching(max_batch_tokens=64)) as manager:
        hold(manager, users)
        assert manager.most == W // 8
        assert blocks_of(manager) > 0
        manager.processor.fail_all_requests(RuntimeError("the end"))
        assert blocks_of(manager) == 0
        assert manager.free == 1.0
    assert all(len(user.history) > 3 * W for user in users)
    assert check_talks(tested, users, KEEP) <= (3 if strips else 0)  # a first prompt may be too short for a copy
    if not strips:
        for user in users:
            before = [0, *(len(one.prompt) + one.new - 1 for one, _, _ in user.turns)]
            assert [read for *_, read in user.turns] == [
                len(one.prompt) - known for (one, *_), known in zip(user.turns, before, strict=False)
            ]


@pytest.mark.parametrize("piece", [None, 7])
def test_a_window_that_holds_all_goes_back_to_where_texts_part(piece):
    tested, wanted = model("llama", max_position_embeddings=256), keeping(128, S, prefill_chunk_size=piece)
    users = talks(2, 4, seed=5, least=6, strips=4)
    with driven(tested, wanted, batching(num_blocks=80)) as manager:
        hold(manager, users)
    check_talks(tested, users, wanted)
    assert all(read < len(one.prompt) for user in users for one, _, read in user.turns[2:])


def test_what_begins_alike_is_copied(llama):
    """Several talks with the same instructions: each is read from there on, and takes nothing from the others."""
    tested, wanted = model("llama", max_position_embeddings=256), keeping(128, S)
    system, first = ids(30, 1), []
    with driven(tested, wanted, batching()) as manager:
        for seed in (2, 3, 4):
            request = Asked([*system, *ids(8, seed)], 5)
            ((result, read),) = ask(manager, request)
            first.append((request, result))
            assert read == (38 if seed == 2 else 8)
        second = [longer(request, result, 6, 5 + place) for place, (request, result) in enumerate(first)]
        found = ask(manager, *second)
    for request, (result, read) in zip(second, found, strict=True):
        assert read == 7
        sink_patch.kept_streams.clear()
        check(tested, request, result, wanted)


def test_wanted_twice(llama):
    """One goes on in it; the other reads anew."""
    (request,) = asked([(30, 9)])
    with driven(llama, KEEP, batching()) as manager:
        ((result, _),) = ask(manager, request)
        both = [longer(request, result, 10, seed) for seed in (1, 2)]
        (first, read), (second, other) = ask(manager, *both)
    assert (read, other) == (11, len(both[1].prompt))
    for one, found in zip(both, (first, second), strict=True):
        sink_patch.kept_streams.clear()
        if found is first:
            check(llama, request, result, KEEP)
        check(llama, one, found, KEEP)


@pytest.mark.parametrize(("blocks", "is_lost"), [(5, True), (8, False)])
def test_little_room(llama, blocks, is_lost):
    """What is kept is given up for others; what is said is right, whether it was or not."""
    users = talks(4, 4, seed=3)
    with driven(llama, KEEP, batching(num_blocks=blocks)) as manager:
        hold(manager, users)
        assert manager.beside >= 2
    assert bool(check_talks(llama, users, KEEP)) == is_lost


def test_what_is_kept_costs_nobody_a_place(llama):
    """Three requests fill the room, and are kept; three others are all in the next batch."""
    with driven(llama, KEEP, batching(num_blocks=6)) as manager:
        ask(manager, *asked([(20, 5)] * 3, seed=1))
        assert blocks_of(manager) == 6
        manager.processor.scheduler.safety_margin = 0.3  # if what is kept counted, one request would begin alone
        others = asked([(18, 5)] * 3, seed=2)
        names = [manager.add(one) for one in others]
        manager.beside = 0
        manager.step()
        assert manager.beside == 3
        manager.run()
    for one, name in zip(others, names, strict=True):
        sink_patch.kept_streams.clear()
        check(llama, one, manager.done[name], KEEP)


def test_more_room_than_the_slot_has(llama):
    """A short talk has one block; in its next turn it needs two, and another one is given up."""
    requests = asked([(3, 3), (12, 4)])
    with driven(llama, KEEP, batching(num_blocks=3)) as manager:
        (short, _), _ = ask(manager, *requests)
        assert blocks_of(manager) == 3
        turn = longer(requests[0], short, 20, 1)
        ((result, read),) = ask(manager, turn)
    assert read == 21
    check(llama, requests[0], short, KEEP)
    check(llama, turn, result, KEEP)


def test_more_room_than_there_is(llama):
    """It waits for a request that runs, and has lost nothing."""
    requests = asked([(3, 3), (12, 30)])
    with driven(llama, KEEP, batching(num_blocks=3)) as manager:
        ((short, _),) = ask(manager, requests[0])
        name = manager.add(requests[1])
        manager.step()
        turn = longer(requests[0], short, 20, 1)
        ((result, read),) = ask(manager, turn)
    assert read == 21
    check(llama, requests[0], short, KEEP)
    check(llama, turn, result, KEEP)
    sink_patch.kept_streams.clear()
    check(llama, requests[1], manager.done[name], KEEP)


def test_the_other_slot_of_its_own_talk_makes_room():
    """A turn needs one block more than its slot has, and nothing else is kept; a request that runs has the others."""
    tested, asked_for = model("gemma3_text"), keeping(32, S)
    first, other = Asked(ids(20, 1), 3), Asked(ids(2, 2), 22)
    with driven(tested, asked_for, batching(num_blocks=6)) as manager:
        ((result, _),) = ask(manager, first)
        running = manager.add(other)
        manager.step()
        turn = longer(first, result, 20, 3, new=3)
        name = manager.add(turn)
        while name not in manager.done:
            manager.step()
        assert running not in manager.done
        manager.run()
        assert manager.read[name] == 21 + turn.new - 1
    for one, known in ((turn, name), (other, running)):
        check(tested, one, manager.done[known], asked_for)


def test_blocks_that_keep_room_apart(llama, monkeypatch):
    """Where a kept slot cannot grow although nothing else is there, it is given up as well."""
    (request,), let_in = asked([(20, 5)]), SinkRoom.let_in
    with driven(llama, KEEP, batching()) as manager:
        ((result, _),) = ask(manager, request)
        monkeypatch.setattr(SinkRoom, "let_in", lambda room, state, found: not found and let_in(room, state, found))
        turn = longer(request, result, 5, 1)
        ((again, read),) = ask(manager, turn)
    assert read == len(turn.prompt)
    check(llama, turn, again, KEEP)


def test_the_least_recently_used_goes_first(llama):
    """Two are kept; the first of three is not, unless it is used in between."""
    for used, kept in ((False, [1, 2]), (True, [0, 2])):
        requests = asked([(20, 5)] * 3, seed=7)
        with driven(llama, keeping(W, S, keep=2), batching()) as manager:
            results = [ask(manager, one)[0][0] for one in requests[:2]]
            if used:
                turn = longer(requests[0], results[0], 3, 1)
                results[0] = ask(manager, turn)[0][0]
                requests[0] = turn
            results.append(ask(manager, requests[2])[0][0])
            turns = [longer(*pair, 3, 2) for pair in zip(requests, results, strict=True)]
            order = [*kept, *(one for one in range(3) if one not in kept)]
            read = {place: ask(manager, turns[place])[0][1] for place in order}
            assert [place for place in order if read[place] == 4] == kept


def test_what_is_about_to_be_used_does_not_make_room(llama):
    """A request that needs some waits before one that goes on in the older one of two; the other one is given up."""
    requests = asked([(20, 5)] * 3, seed=8)
    with driven(llama, KEEP, batching(num_blocks=4)) as manager:
        ((result, _),) = ask(manager, requests[0])
        ask(manager, requests[1])
        assert blocks_of(manager) == 4
        (_, new), (_, read) = ask(manager, requests[2], longer(requests[0], result, 5, 1))
    assert (new, read) == (20, 6)


def test_where_answers_are_written_anew_their_ends_make_room(llama):
    (talk,) = talks(1, 3, seed=6, least=10, strips=4)
    with driven(llama, KEEP, batching(num_blocks=6)) as manager:
        for _ in range(3):
            talk.go_on(manager)
            manager.run()
            ask(manager, *asked([(20, 5)], seed=9))  # two blocks, beside four of the talk
        talk.go_on(manager)
    assert all(read < len(one.prompt) for one, _, read in talk.turns[2:])
    assert len(talk.turns) == 3


def test_the_same_twice(llama):
    """One is enough."""
    (request,) = asked([(10, 5)])
    with driven(llama, KEEP, batching()) as manager:
        ask(manager, request, request)
        assert blocks_of(manager) == 2


def test_a_session_that_begins(llama):
    (request,) = asked([(20, 5)])
    with driven(llama, KEEP, batching()) as manager:
        ((result, _),) = ask(manager, request)
        manager.processor.reset()
        assert blocks_of(manager) == 0
        assert manager.free == 1.0
        turn = longer(request, result, 5, 1)
        ((_, read),) = ask(manager, turn)
    assert read == len(turn.prompt)


CHANGES = {
    "weights": lambda tested: tested.model.layers[0].mlp.up_proj.weight.data.mul_(1.5),
    "settings": lambda tested: tested.model.layers[0].mlp.register_forward_hook(lambda *_: None),
    "forgotten": sink_patch.kept_streams.clear,
    "all forgotten": lambda _tested: sink_patch.kept_streams.clear(),
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("when", ["between", "meanwhile"])
def test_another_model(what, when):
    """Nothing that was read by another one is used, nor what was read by both; and what is to be forgotten is."""
    tested, (request,) = copy.deepcopy(model("llama")), asked([(20, 9)])
    with driven(tested, KEEP, batching()) as manager:
        name = manager.add(request)
        for _ in range(4 if when == "meanwhile" else 99):
            manager.step()
        CHANGES[what](tested)
        manager.run()
        turn = longer(request, manager.done[name], 5, 1)
        ((result, read),) = ask(manager, turn)
    assert read == len(turn.prompt)
    check(tested, turn, result, KEEP)


@pytest.mark.parametrize("how", ["cancelled", "failed"])
def test_a_request_that_does_not_end_well(llama, how):
    """What was copied for it goes with it, and what it had taken is lost."""
    (request,) = asked([(40, 9)])
    with driven(llama, KEEP, batching()) as manager:
        ((result, _),) = ask(manager, request)
        kept = blocks_of(manager)
        turn = longer(request, result, 10, 1)
        name = manager.add(turn)
        for _ in range(4):
            manager.step()
        assert blocks_of(manager) == kept == 4
        if how == "failed":
            manager.processor.handle_batch_error(RuntimeError("of a test"))
        else:
            manager.manager.cancel_request(name)
        manager.run()
        assert blocks_of(manager) == 0
        ((again, read),) = ask(manager, turn)
    assert read == len(turn.prompt)
    check(llama, turn, again, KEEP)


@pytest.mark.parametrize("prompt", [10, 30], ids=["within the window", "longer"])
def test_several_texts_for_one_prompt(llama, prompt):
    """As in generate they go on in nothing, and are not kept."""
    wanted, (turn,) = copy.deepcopy(KEEP), asked([(prompt, 9)])
    wanted.num_return_sequences = 2
    with driven(llama, wanted, batching()) as manager:
        name = manager.add(turn)
        done = manager.run()
        assert set(done) == {name, f"{name}__child#0"}
        assert blocks_of(manager) == 0
    for one in done.values():
        check(llama, turn, one, config(W, S))


def test_a_batch_of_few_requests(llama):
    """Those that have no place in it begin in the next one, with what is kept for them."""
    requests = asked([(20, 6)] * 3, seed=4)
    with driven(llama, KEEP, batching(max_requests_per_batch=2)) as manager:
        results = ask(manager, *requests)
        turns = [longer(one, result, 5, 1) for one, (result, _) in zip(requests, results, strict=True)]
        assert [read for _, read in ask(manager, *turns)] == [6, 6, 6]
        assert manager.beside == 2


def test_the_next_turn_of_a_long_piece_that_no_batch_has_room_for_is_read_anew(llama):
    """It would go in at once, as in generate; a prompt past the context goes in by pieces."""
    (request,) = asked([(40, 9)])
    with driven(llama, KEEP, batching(max_batch_tokens=28)) as manager:
        ((result, _),) = ask(manager, request)
        turn = longer(request, result, 30, 1)
        ((again, read),) = ask(manager, turn)
    assert read == len(turn.prompt)
    check(llama, turn, again, KEEP)


def test_sessions_keep_nothing(llama):
    """A manager that is kept for the next session frees all when one ends."""
    (request,) = asked([(20, 9)])
    try:
        for _ in range(2):
            done = llama.generate_batch([request.prompt], KEEP, batching(), persistent_manager=True, max_new_tokens=9)
            assert [result.error for result in done.values()] == [None]
            processor = llama._cached_continuous_batching_manager.batch_processor
            assert processor.cache.compute_free_capacity() == 1.0
    finally:
        llama.destroy_cached_continuous_batching_manager()


def test_pages_that_are_taken_away(llama, monkeypatch):
    """A copy for a request that is begun anew is freed with its pages."""
    requests = asked([(30, 20), (30, 20)])
    with driven(llama, KEEP, batching(cpu_offload_space=0.0)) as manager:
        names = [manager.add(one) for one in requests]
        scheduler = manager.processor.scheduler

        def take_away(number: int) -> None:
            if number == 5:
                scheduler.starved_requests = [(state, 1) for state in list(scheduler.active_requests.values())[1:]]
                with monkeypatch.context() as patched:
                    patched.setattr(manager.processor.cache, "count_storable_requests", lambda _needed: -1)
                    assert manager.processor.offloading_manager.offload_requests()

        manager.run(take_away)
        manager.processor.fail_all_requests(RuntimeError("the end"))
        assert blocks_of(manager) == 0
    for one, name in zip(requests, names, strict=True):
        sink_patch.kept_streams.clear()
        check(llama, one, manager.done[name], KEEP)
