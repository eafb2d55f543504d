"""Where the tokens of a request lie in the pages that transformers gives it: a ring behind fixed sinks."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from sink_patch.compat import models as transformers_models
from sink_patch.rules.kinds import LayerKind
from sink_patch.rules.plans import RowPlan, plan_row
from sink_patch.rules.rows import Row


class SinkPages:
    """Stands before an allocator of transformers, still unused: at most ceil(W / page) blocks a request.

    Token i lies in slot i if it is a sink, else in slot S + (i - S) % (W - S), as in `Ring`; slot s is the place
    s % page of the page that is entry s // page of the request's block table.

    A forward stores its tokens first and reads all that it sees back, unless some request of the batch brings more than
    its ring holds: then old tokens are read first, and sentinels stand where new ones go (`_reads_first`).

    Args:
        allocator: of layers that all hold the same.
        kind: what they hold.
        is_recorded: whether batches run in a graph, in which the way of reading must not change.
    """

    def __init__(self, allocator: Any, kind: LayerKind, *, is_recorded: bool):
        self._theirs, self._kind, self._is_recorded = allocator, kind, is_recorded
        self._reads_first = is_recorded
        self._stored = set[int]()
        allocator.supports_block_sharing = allocator.supports_block_table = allocator.use_block_sharing = False
        indices = ("get_seqlen_k", "get_read_indices", "get_write_indices")
        transformers_models.stand_before(self, allocator, "_compute_blocks_needed", *indices, "update")

    def begin(self, plans: Iterable[RowPlan]) -> None:
        """Before a batch of requests with these plans."""
        self._reads_first = self._is_recorded or any(self._is_longer(plan) for plan in plans)

    @property
    def missing(self) -> Sequence[int]:
        """Layers that have stored nothing so far."""
        return sorted(set(self._theirs.layer_indices) - self._stored)

    def _is_longer(self, plan: RowPlan) -> bool:
        return plan.total > self._kind.capacity and plan.new > self._kind.ring

    def _sees_the_buffer(self, past: int, new: int) -> bool:
        """Whether what is seen, once it is stored, is what lies in the first slots, in whatever order."""
        return new == 1 or past + new <= self._kind.capacity

    def _plan(self, past: int, new: int) -> RowPlan:
        """What a forward sees; whatever the clock."""
        return plan_row(Row(past), new, self._kind.capacity, self._kind.num_sink_tokens, sys.maxsize)

    # ---- what transformers asks
    def _compute_blocks_needed(self, wrapped: Any, allocated_blocks: int, past_length: int, query_length: int) -> int:
        total = min(past_length + query_length, self._kind.capacity)
        needed: int = wrapped(allocated_blocks, 0, total)
        return needed

    def get_seqlen_k(self, _wrapped: Any, past_length: int, query_length: int) -> int:
        if self._sees_the_buffer(past_length, query_length):
            return min(past_length + query_length, self._kind.capacity)
        return self._plan(past_length, query_length).past + query_length

    def get_read_indices(self, _wrapped: Any, request_id: str, past_length: int, query_length: int) -> list[int]:
        if self._sees_the_buffer(past_length, query_length) and not self._reads_first:
            seen = min(past_length + query_length, self._kind.capacity)
            return places_in(self._theirs, request_id, [(0, seen)])
        plan = self._plan(past_length, query_length)
        runs = self._kind.past_runs(plan)
        if self._reads_first:
            new = [int(self._theirs.sentinel_index)] * query_length
            return places_in(self._theirs, request_id, runs) + new
        written = self._kind.write_runs(plan, query_length)
        return places_in(self._theirs, request_id, [*runs, *((slot, length) for slot, _, length in written)])

    def get_write_indices(self, _wrapped: Any, request_id: str, past_length: int, query_length: int) -> list[int]:
        indices = [int(self._theirs.write_trash_index)] * query_length
        for slot, column, length in self._kind.write_runs(self._plan(past_length, query_length), query_length):
            indices[column : column + length] = places_in(self._theirs, request_id, [(slot, length)])
        return indices

    def update(
        self, _wrapped: Any, key_states: Any, value_states: Any, layer_idx: int, *where: Any, **named: Any
    ) -> Any:
        self._stored.add(layer_idx)
        way = transformers_models.reading_first() if self._reads_first else transformers_models.storing_first()
        return way(self._theirs, key_states, value_states, layer_idx, *where, **named)


def places_in(allocator: Any, request_id: str, runs: Iterable[tuple[int, int]]) -> list[int]:
    """Where slots of a request lie in the pages of an allocator, as rows of the keys of its first layer.

    Args:
        runs: (first slot, length) each.
    """
    table: Sequence[int] = allocator.block_table[request_id]
    page, stride, found = allocator.tokens_per_page, allocator.block_physical_stride, list[int]()
    for slot, length in runs:
        for entry in range(slot // page, (slot + length - 1) // page + 1):
            start, stop = max(slot, entry * page), min(slot + length, (entry + 1) * page)
            first = table[entry] * stride + start - entry * page
            found.extend(range(first, first + stop - start))
    return found


def key_rows(allocator: Any) -> torch.Tensor:
    """All keys and values of an allocator, [rows, heads, dim]."""
    tensor: torch.Tensor = allocator.cache_tensor  # [tokens, 2, heads, dim]
    return tensor.view(-1, *tensor.shape[2:])
