"""Room for requests: one that is let in has all blocks that it will ever need, new ones or those of a kept slot."""

from __future__ import annotations

from math import ceil
from typing import Any

from sink_patch.batching.service import Service
from sink_patch.batching.slots.blocks import Blocks, Holder
from sink_patch.batching.slots.entries import Found
from sink_patch.batching.slots.kept import KeptSlots
from sink_patch.batching.slots.streams import limit_of, stream_of
from sink_patch.compat import models as transformers_models
from sink_patch.errors import SinkArgumentError


class SinkRoom:
    """Stands before a paged cache: a request has all its blocks when it is let in.

    So as many requests run as have room for what they will hold at most, and none of them ever waits for room again.
    Kept slots are given up for a request before it waits.
    """

    def __init__(self, cache: Any, service: Service, blocks: Blocks, kept: KeptSlots):
        self._theirs, self._service, self._blocks, self._kept = cache, service, blocks, kept
        cache.use_prefix_sharing = cache.allow_block_sharing = False
        cache.read_cache_limit = service.sizes.window_length
        cache.max_decode_fast_path_length = 0
        transformers_models.stand_before(self, cache, "can_store_request_tokens", "free_blocks")

    def can_store_request_tokens(self, wrapped: Any, state: Any, request_len: int, dry_run: bool = False) -> bool:
        wanted = max(request_len, self._most(state) - state.current_len())
        fits: bool = wrapped(state, wanted, dry_run)
        return fits

    def free_blocks(self, wrapped: Any, request_id: str, *others: Any, **named: Any) -> None:
        self._kept.ended(request_id)
        wrapped(request_id, *others, **named)

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
        """Whether a request has its blocks, or may have them now; else it must not take a place in a batch.

        True while something is kept: only giving that up shows how much room there is (`let_in`).
        """
        if self._blocks.has(state.request_id) or not self._kept.is_empty:
            return True
        self._theirs.pool.try_to_free_sectors()
        fits: bool = self._theirs.can_store_request_tokens(state, 0, True)
        return fits

    def let_in(self, state: Any, found: Found | None) -> bool:
        """Give a request its blocks; returns whether there is room for it.

        Args:
            found: a kept slot in which it begins; None: it has none.
        """
        if self._blocks.has(state.request_id):
            return True
        wanted = max(0, self._most(state) - state.current_len())
        if found is None:
            return self._give(state, wanted)
        if not found.is_continued and self._give(state, wanted, found):
            self._blocks.copy(found.slot.key, state.request_id)
        else:
            more = max(0, self._most(state) - found.tokens)
            holder = Holder(found.slot.key, found.tokens)
            if not self._give(holder, more, found) and not (
                self._kept.give_up_beside(found) and self._blocks.give(holder, more)
            ):
                return False
            self._kept.take(state, found)
        stream, slot = stream_of(state), found.slot
        stream.base, stream.shown, stream.pristine = slot.base, slot.shown, slot.pristine
        state.position_offset = found.tokens
        state.remaining_prefill_tokens = state.initial_tokens[found.tokens :]
        return True

    def meet_margin(self, margin: float) -> None:
        """Give up kept slots until so much of the cache is free: no request waits for that because of them."""
        while self._theirs.compute_free_capacity() < margin and self._kept.give_up():
            pass

    @property
    def batch_tokens(self) -> int:
        """Tokens of the largest batch."""
        return int(self._theirs.max_batch_tokens)

    def _give(self, holder: Any, more: int, found: Found | None = None) -> bool:
        while not self._blocks.give(holder, more):
            if not self._kept.give_up(but=None if found is None else found.entry):
                return False
        return True

    def _most(self, state: Any) -> int:
        """Tokens that a request will hold at most."""
        return min(self._service.sizes.window_length, limit_of(state))
