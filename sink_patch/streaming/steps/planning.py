"""What one forward is to see, row by row, and what no forward may ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sink_patch.arguments import Sizes
from sink_patch.errors import CacheStateError, SinkArgumentError
from sink_patch.models.facts import ModelFacts
from sink_patch.rules.padding import new_tokens
from sink_patch.rules.plans import RowPlan, plan_row
from sink_patch.rules.rows import Row


@dataclass(frozen=True, eq=False)
class Planner:
    """Applies the rules (rules/plans.py) to the rows of a cache.

    Args:
        sizes: of the cache.
        horizon: RoPE position at which a row's clock is set back.
        facts: of the model.
    """

    sizes: Sizes
    horizon: int
    facts: ModelFacts

    def new_tokens(self, held: Sequence[Row], fed: int, rows: int, columns: int, attention_mask: Any) -> list[int]:
        """How many tokens a forward brings to each row.

        Args:
            held: the rows so far.
            fed: columns so far.
            rows, columns: of this forward.
            attention_mask: None, or [rows, fed + columns] or [rows, columns], 1 for real tokens.

        Raises:
            CacheStateError: another batch size, or padding that a state would take in.
            SinkArgumentError: a mask that does not fit, or no tokens.
        """
        if len(held) != rows:
            raise CacheStateError(
                f"The cache holds {len(held)} rows, but {rows} were fed. Use a new SinkCache for another batch size."
            )
        new = new_tokens(attention_mask, [row.seen for row in held], fed, columns)
        if columns == 0:
            raise SinkArgumentError("A forward of no tokens was asked for. Pass the new tokens of the stream.")
        if self.facts.has_states and any(row.seen and count != columns for row, count in zip(held, new, strict=True)):
            raise CacheStateError(
                "Padding in the middle of a stream would enter the recurrent state of this model. Feed rows of one "
                "length, or the new tokens of each row by themselves."
            )
        return new

    def plan(self, held: Sequence[Row], new: Sequence[int], fed: int, columns: int) -> list[RowPlan]:
        """One plan for each row of a forward.

        Args:
            held: the rows so far, with room for it.
            new: how many tokens it brings to each.
            fed, columns: as for `new_tokens`.

        Raises:
            CacheStateError: more positions than there are, or tokens that this model can only take one by one.
        """
        plans = self._plans(held, new)
        self._check_positions(plans)
        if fed and columns > 1:
            # of sliding windows no message leaves, and no image
            seen = [min(plan.seen, self.sizes.window_length) if plan.dropped else plan.past for plan in plans]
            self._check_one_by_one(max(seen), columns)
        return plans

    def next_plans(self, held: Sequence[Row]) -> list[RowPlan] | None:
        """The plans of a forward of one token in each row; None: keys must be turned for it, or positions end."""
        plans = self._plans(held, [1] * len(held))
        return None if any(plan.turn or plan.first_position >= self.horizon for plan in plans) else plans

    def _plans(self, held: Sequence[Row], new: Sequence[int]) -> list[RowPlan]:
        """Rows that are alike share a plan."""
        sizes = self.sizes.window_length, self.sizes.num_sink_tokens, self.horizon
        if len(held) == 1:
            return [plan_row(held[0], new[0], *sizes)]
        rows = list(zip(held, new, strict=True))
        made = {row: plan_row(*row, *sizes) for row in set(rows)}
        return [made[row] for row in rows]

    def fits_in_one_forward(self, held: Sequence[Row], columns: int) -> bool:
        """Whether so many new tokens, fed at once, stay within the context that the model was trained on."""
        if self.facts.one_by_one is not None or not any(layer.entry.attention for layer in self.facts.layers):
            return True
        ring = self.sizes.window_length - self.sizes.num_sink_tokens
        if columns <= ring:
            return True
        sinks = min(self.sizes.num_sink_tokens, max((row.seen for row in held), default=0))
        return columns + sinks <= self.facts.context.length

    def _check_one_by_one(self, past: int, columns: int) -> None:
        one_by_one = self.facts.one_by_one
        if one_by_one is not None and past + columns > one_by_one.beyond:
            raise CacheStateError(
                f"{one_by_one.reason}, and {columns} were fed after others. Feed them one by one, or the whole text to "
                "a new cache."
            )

    def _check_positions(self, plans: Sequence[RowPlan]) -> None:
        """Only a forward longer than the context can need more positions than the horizon leaves."""
        limit = self.facts.context.limit
        if limit is not None and (most := max([plan.first_position + plan.new for plan in plans])) > limit:
            raise CacheStateError(
                f"This forward needs {most} positions, and the model may use {limit}, as "
                f"{self.facts.context.why_limited}. Feed the text in pieces of "
                f"{self.sizes.window_length - self.sizes.num_sink_tokens} tokens or fewer (prefill_chunk_size in "
                "generate)."
            )
