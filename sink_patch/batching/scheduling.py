"""Which requests go into the next batch, and how much of each: whole pieces, with room for all that they will hold."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from math import ceil
from typing import Any

from sink_patch.batching.service import Service
from sink_patch.batching.turning import prompt_of, stream_of
from sink_patch.compat import models as transformers_models
from sink_patch.errors import CacheStateError, SinkArgumentError


class SinkRoom:
    """Stands before a paged cache: a request has all its blocks when it is let in.

    So as many requests run as have room for what they will hold at most, and none of them ever waits for room again.
    """

    def __init__(self, cache: Any, service: Service):
        self._theirs, self._service = cache, service
        cache.use_prefix_sharing = cache.allow_block_sharing = False
        cache.read_cache_limit = service.sizes.window_length
        cache.max_decode_fast_path_length = 0
        transformers_models.stand_before(self, cache, "can_store_request_tokens")

    def can_store_request_tokens(self, wrapped: Any, state: Any, request_len: int, dry_run: bool = False) -> bool:
        wanted = max(request_len, self._most(state) - state.current_len())
        fits: bool = wrapped(state, wanted, dry_run)
        return fits

    def check_fits(self, state: Any) -> None:
        """Refuse a request for which there is no room even where it is alone.

        Raises:
            SinkArgumentError: as it says.
        """
        most, sectors = self._most(state), 0
        for allocator in self._theirs.cache_allocators.values():
            sectors += ceil(allocator._compute_blocks_needed(0, 0, most) / allocator.blocks_per_sector)
        if sectors > self._theirs.num_sectors:
            raise SinkArgumentError(
                f"A request of {len(state.initial_tokens)} tokens, which will hold {most} ({self._service.kept}), "
                f"needs more than the {self._theirs.num_blocks} blocks that there are. Raise num_blocks in the "
                "ContinuousBatchingConfig, or use a shorter window."
            )

    def has_room_for(self, state: Any) -> bool:
        """Whether a request has its blocks, or could have them now; else it must not take a place in a batch."""
        if all(state.request_id in one.block_table for one in self._theirs.cache_allocators.values()):
            return True
        self._theirs.pool.try_to_free_sectors()
        fits: bool = self._theirs.can_store_request_tokens(state, 0, True)
        return fits

    @property
    def batch_tokens(self) -> int:
        """Tokens of the largest batch."""
        return int(self._theirs.max_batch_tokens)

    def _most(self, state: Any) -> int:
        """Tokens that a request will hold at most."""
        total: int = len(state.initial_tokens) + state._new_tokens_limit
        return min(self._service.sizes.window_length, total)


class SinkScheduling:
    """Stands before a scheduler: prompts are cut where `generate` cuts them, whatever else is in the batch.

    A piece that must go in whole waits for a batch that has room for it. That is the next one, in which it goes first;
    in the one after that, requests have their usual order again.
    """

    def __init__(self, processor: Any, service: Service, room: SinkRoom):
        self._service, self._room = service, room
        self._scheduler = processor.scheduler
        self._processor = weakref.ref(processor)  # which is freed with its pages
        # there a request that is read to the end of its prompt is scheduled again before it is forked
        self._forks = not processor.use_async_batching
        wrapped = ("add_waiting_request", "set_request_cancellation", "_process_candidates", "_schedule_request")
        transformers_models.stand_before(self, self._scheduler, *wrapped)

    def add_waiting_request(self, wrapped: Any, state: Any) -> None:
        """Let a request wait for its turn.

        Several texts for one prompt share what is read of it where it can be cut before its last token; else each is a
        request of its own.

        Raises:
            SinkArgumentError: there will never be room for it.
        """
        prompt = prompt_of(state)
        try:
            self._service.check_prompt(prompt, self._room.batch_tokens)
            self._room.check_fits(state)
        except SinkArgumentError as refused:  # transformers tells of the first text alone; callers wait for all
            for child in self._children(state, state.num_children):
                self._refuse(refused, child)
            raise
        children = state.num_children
        if not (self._forks and 1 < prompt <= self._service.cuts.free(prompt)):
            state.num_children = 0
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
            yield child

    def _refuse(self, error: Exception, state: Any) -> None:
        if (processor := self._processor()) is not None:
            processor._handle_request_error(error, state)

    def _process_candidates(self, wrapped: Any, candidates: list[Any], token_budget: int, *others: Any) -> Any:
        return wrapped(self._in_turn(candidates, token_budget), token_budget, *others)

    def _schedule_request(self, wrapped: Any, state: Any, ahead: list[int], token_budget: int, *others: Any) -> None:
        wrapped(state, ahead, self._taken(state, ahead, token_budget), *others)

    def _in_turn(self, candidates: Sequence[Any], budget: int) -> list[Any]:
        """Those for which there is room, in the order in which they are taken; `budget` tokens in all."""
        storable = [state for state in candidates if self._room.has_room_for(state)]
        first = next((state for state in storable if stream_of(state).waits), None)
        order = storable if first is None else [first, *(one for one in storable if one is not first)]
        chosen = []
        for state in order:
            ahead = state.tokens_to_process if self._is_decoding(state) else state.remaining_prefill_tokens
            taken = self._taken(state, ahead, budget)
            stream_of(state).waits = first is None and not taken and budget > 0
            if taken:
                chosen.append(state)
                budget -= taken
        return chosen

    def _is_decoding(self, state: Any) -> bool:
        return bool(state.status.name == "DECODING")

    def _taken(self, state: Any, ahead: Sequence[int], budget: int) -> int:
        """How many of the tokens ahead go into a batch that has room for `budget`; 0: they wait.

        Raises:
            CacheStateError: the request stands within a piece that must go in whole.
        """
        seen, prompt, cuts = state.position_offset, prompt_of(state), self._service.cuts
        if not cuts.is_between(seen, prompt):
            raise CacheStateError(
                f"Request {state.request_id} was stopped after {seen} tokens, within a piece of its prompt, and cannot "
                "go on from there. Pass it again as a new request."
            )
        cut = cuts.next(seen, prompt)
        wanted = min(cut.tokens, len(ahead))
        if cut.whole:
            return wanted if wanted <= budget else 0
        return min(wanted, budget)


def _child_of(request_id: str) -> str:
    """How the names of the other texts of a prompt begin."""
    return f"{request_id}__child#"
