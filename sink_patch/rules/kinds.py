"""The kinds of layers: how many tokens one holds, in which slot each of them lies, and which a forward sees."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from sink_patch.rules.plans import RowPlan
from sink_patch.rules.rows import Row

Run = tuple[int, int, int]  # (first slot, first column of the forward, length)


@dataclass(frozen=True)
class LayerKind:
    """What a layer holds: `capacity` tokens, the first `num_sink_tokens` of them for good.

    A `local` kind is a sliding window shorter than the cache's: it sees its own window, as the model was trained. An
    `ordered` kind is always read in stream order, because the model takes distances from the order of the keys (ALiBi).
    In `spare` more slots the tokens that have left the window last stay for a while, unseen: they come back when newer
    ones are taken back.
    """

    capacity: int
    num_sink_tokens: int
    local: bool = False
    ordered: bool = False
    spare: int = 0

    @cached_property
    def slots(self) -> int:
        return self.capacity + self.spare

    @cached_property
    def ring(self) -> int:
        return self.slots - self.num_sink_tokens

    def count(self, row: Row | RowPlan) -> int:
        """Tokens that a row has seen, as these layers count them, where the first S are the sinks.

        What has left in whole messages or images does not count, but in a sliding window shorter than the cache's,
        which keeps its own.
        """
        return row.seen if self.local else row.seen - row.dropped

    def past(self, plan: RowPlan) -> int:
        """How many cached tokens the forward sees."""
        return min(plan.seen, self.capacity - min(plan.new, 1)) if self.local else plan.past

    def evicts(self, plan: RowPlan) -> bool:
        """Whether a token that the layer sees is overwritten."""
        return plan.seen > 0 and not self.is_in_order(plan) and plan.new > self.spare

    def is_in_order(self, plan: RowPlan) -> bool:
        """Whether what the forward sees lies in the first slots, one after the other, when it is stored."""
        return self.count(plan) + plan.new <= self.capacity

    def is_the_buffer(self, columns: int) -> bool:
        """Whether what the forward sees is all that is in the buffer, in whatever order."""
        return columns == 1 and not self.ordered and not self.spare

    def slot(self, index: int) -> int:
        """Where the token lies that is the `index`-th of those that the layers count, and no sink."""
        return self.num_sink_tokens + (index - self.num_sink_tokens) % self.ring

    def past_runs(self, plan: RowPlan) -> list[tuple[int, int]]:
        """(slot, length) of the visible past in stream order: sinks, then the newest others."""
        seen, past = self.count(plan), self.past(plan)
        sinks = min(seen, self.num_sink_tokens, past)
        runs = [(0, sinks), *self._ring_runs(seen - (past - sinks), past - sinks)]
        return [run for run in runs if run[1] > 0]

    def write_runs(self, plan: RowPlan, columns: int) -> list[Run]:
        """The tokens of the forward that stay, as runs; padding, if any, is to the left of a row's tokens."""
        seen = self.count(plan)
        total = seen + plan.new
        first_column = columns - total  # column of index 0
        sinks = max(0, min(self.num_sink_tokens, total) - seen)
        start = max(seen + sinks, total - self.ring)
        runs = [(seen, seen + first_column, sinks)]
        index = start
        for slot, length in self._ring_runs(start, total - start):
            runs.append((slot, index + first_column, length))
            index += length
        return [run for run in runs if run[2] > 0]

    def _ring_runs(self, start: int, count: int) -> list[tuple[int, int]]:
        """Slots of the indices start, ..., start + count - 1, none of them a sink's; at most one wrap."""
        if count <= 0:
            return []
        offset = (start - self.num_sink_tokens) % self.ring
        before_wrap = min(count, self.ring - offset)
        return [(self.num_sink_tokens + offset, before_wrap), (self.num_sink_tokens, count - before_wrap)]
