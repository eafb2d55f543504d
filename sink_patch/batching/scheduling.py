"""Which requests go into the next batch, and how much of each: whole pieces, with room for all that they will hold."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from sink_patch.batching.service import Service
from sink_patch.batching.slots.entries import Found
from sink_patch.batching.slots.kept import Slots
from sink_patch.batching.slots.room import SinkRoom
from sink_patch.batching.slots.streams import Reading, prompt_of, stream_of
from sink_patch.compat import models as transformers_models
from sink_patch.errors import CacheStateError, SinkArgumentError
from sink_patch.generation.inputs.cuts import Text


class SinkScheduling:
    """Stands before a scheduler: prompts are cut where `generate` cuts them, whatever else is in the batch.

    A piece that must go in whole waits for a batch that has room for it. That is the next one, in which it goes first;
    in the one after that, requests have their usual order again.
    """

    def __init__(self, processor: Any, service: Service, room: SinkRoom, slots: Slots):
        self._service, self._room = service, room
        self._kept, self._readings, self._model = slots.kept, slots.readings, slots.model
        self._scheduler = processor.scheduler
        self._processor = weakref.ref(processor)  # which is freed with its pages
        # there a request that is read to the end of its prompt is scheduled again before it is forked
        self._forks = not processor.use_async_batching
        self._is_in_margin = True
        wrapped = ("add_waiting_request", "set_request_cancellation", "_process_candidates", "_schedule_request")
        others = ("_try_to_meet_safety_margin", "finish_request", "reset")
        transformers_models.stand_before(self, self._scheduler, *wrapped, *others)
        transformers_models.stand_before(self, processor, "fail_all_requests")

    def add_waiting_request(self, wrapped: Any, state: Any) -> None:
        """Let a request wait for its turn.

        Several texts for one prompt share what is read of it where it can be cut before its last token; else each is a
        request of its own.

        Raises:
            SinkArgumentError: there will never be room for it.
        """
        prompt, children = prompt_of(state), state.num_children
        stream_of(state).is_one_of_many |= children > 0
        try:
            self._service.check_prompt(self._readings.fresh(state), self._room.batch_tokens)
            self._room.check_fits(state)
        except SinkArgumentError as refused:  # transformers tells of the first text alone; callers wait for all
            for child in self._children(state, state.num_children):
                self._refuse(refused, child)
            raise
        if not (self._forks and 1 < prompt <= self._service.cuts.free(Text(prompt))):
            state.num_children = 0
        self._kept.expect(state)
        wrapped(state)
        for child in self._children(state, children - state.num_children):
            wrapped(child)

    def set_request_cancellation(self, wrapped: Any, request_id: str) -> None:
        """Cancel a request, with the other texts of its prompt that have not begun."""
        wrapped(request_id)
        for state in [*self._scheduler.waiting_requests.values(), *self._scheduler.active_requests.values()]:
            if state.request_id.startswith(_child_of(request_id)) and not self._is_decoding(state):
                wrapped(state.request_id)

    def _children(self, state: Any, count: int) -> Iterator[Any]:
        """Requests of their own for more texts of a prompt, named as transformers names what it forks."""
        for index in range(count):
            child = state.create_equivalent_initial_request()
            child.request_id = f"{_child_of(state.request_id)}{index}"
            stream_of(child).is_one_of_many = True
            yield child

    def _refuse(self, error: Exception, state: Any) -> None:
        if (processor := self._processor()) is not None:
            processor._handle_request_error(error, state)

    def finish_request(self, wrapped: Any, request_id: str) -> None:
        """What a request that has come to its end has read is kept."""
        state = self._scheduler.active_requests.get(request_id)
        if state is not None and state.status.name == "FINISHED":
            self._kept.keep(state)
        wrapped(request_id)

    def reset(self, wrapped: Any) -> None:
        self._kept.clear()
        wrapped()

    def fail_all_requests(self, wrapped: Any, error: Exception) -> None:
        """The end of each session, whatever it ends with."""
        wrapped(error)
        self._kept.clear()

    def _process_candidates(self, wrapped: Any, candidates: list[Any], token_budget: int, *others: Any) -> Any:
        self._model.begin_batch()
        if not all(map(self._is_decoding, candidates)):
            self._room.meet_margin(self._scheduler.safety_margin)
        self._is_in_margin = type(self._scheduler)._try_to_meet_safety_margin(self._scheduler)
        return wrapped(self._in_turn(candidates, token_budget), token_budget, *others)

    def _try_to_meet_safety_margin(self, _wrapped: Any) -> bool:
        """Whether so much was free before requests were let in."""
        return self._is_in_margin

    def _schedule_request(self, wrapped: Any, state: Any, ahead: list[int], token_budget: int, *others: Any) -> None:
        taken = self._taken(state, self._reading(state), len(ahead), token_budget)
        wrapped(state, ahead, taken, *others)

    def _in_turn(self, candidates: Sequence[Any], budget: int) -> list[Any]:
        """Those that are let in, in the order in which they are taken; `budget` tokens in all."""
        storable = [state for state in candidates if self._room.has_room_for(state)]
        first = next((state for state in storable if stream_of(state).waits), None)
        order = storable if first is None else [first, *(one for one in storable if one is not first)]
        chosen: list[Any] = []
        for state in order:
            is_held_up = not self._is_in_margin and chosen and not self._is_decoding(state)
            if is_held_up or len(chosen) == self._scheduler.max_requests_per_batch:
                break  # as transformers does
            taken = self._let_in(state, budget)
            stream_of(state).waits = first is None and not taken and budget > 0
            if taken:
                chosen.append(state)
                budget -= taken
        return chosen

    def _let_in(self, state: Any, budget: int) -> int:
        """How many tokens of a request go into the next batch; it has all its blocks then."""
        if not budget:
            return 0
        stream = stream_of(state)
        found = self._kept.find(state) if stream.reading is None else None
        while True:
            reading = stream.reading or self._readings.of(state, found)
            ahead = len(state.tokens_to_process if self._is_decoding(state) else state.remaining_prefill_tokens)
            taken = self._taken(state, reading, ahead, budget, found)
            if not taken:
                return 0
            if self._room.let_in(state, found):
                stream.reading, stream.sought = reading, None
                self._kept.copy_before_answer(state)
                return taken
            if found is None or self._scheduler.active_requests:
                return 0  # others will end
            self._kept.forget(found)  # there is room, in parts that its blocks keep apart
            found = None

    def _is_decoding(self, state: Any) -> bool:
        return bool(state.status.name == "DECODING")

    def _reading(self, state: Any) -> Reading:
        return stream_of(state).reading or self._readings.of(state, None)

    def _taken(self, state: Any, reading: Reading, ahead: int, budget: int, found: Found | None = None) -> int:
        """How many of the tokens ahead go into a batch that has room for `budget`; 0: they wait.

        Raises:
            CacheStateError: the request stands within a piece that must go in whole.
        """
        known = 0 if found is None else found.tokens  # it is at its beginning
        seen, ahead, text, cuts = state.position_offset + known, ahead - known, reading.text, self._service.cuts
        if not cuts.is_between(seen, text):
            raise CacheStateError(
                f"Request {state.request_id} was stopped after {seen} tokens, within a piece of its prompt, and cannot "
                "go on from there. Pass it again as a new request."
            )
        cut = cuts.next(seen, text)
        wanted = min(cut.tokens, ahead)
        if cut.whole:
            return wanted if wanted <= budget else 0
        return min(wanted, budget)


def _child_of(request_id: str) -> str:
    """How the names of the other texts of a prompt begin."""
    return f"{request_id}__child#"
