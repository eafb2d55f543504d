"""What one forward attends to, row by row: the rules of StreamingLLM's cache in plain integers.

Words: `seen` tokens are in the stream before this forward (n), which brings `new` ones (q). A token's absolute index
counts 0, 1, 2, ... and is never reset; its RoPE position is that index minus `base`. Source: arXiv 2309.17453,
section 3.2 ("positions within the cache"), extended to forwards of many tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from sink_patch.rules.rows import Row


@dataclass(frozen=True)
class RowPlan:
    """One stream during one forward.

    `past` cached tokens are visible in a layer with sinks; sink s is shown at absolute position s + `shift`; the ring's
    keys are first turned back by `turn` positions, which makes the clock's base `base`. `dropped` tokens have left in
    whole messages or images (`Row`); `lag` is how far positions lie behind indices.
    """

    seen: int
    new: int
    past: int
    shift: int
    base: int
    turn: int
    dropped: int = 0
    lag: int = 0

    @property
    def total(self) -> int:
        return self.seen + self.new

    @property
    def sink_turn(self) -> int:
        """By how many positions the pristine sinks (made at positions 0, 1, ...) are turned for this forward."""
        return self.shift - self.base

    @property
    def first_position(self) -> int:
        """RoPE position of the first new token."""
        return self.seen - self.lag - self.base


def plan_row(row: Row, new: int, window_length: int, num_sink_tokens: int, horizon: int) -> RowPlan:
    """Apply the rules to one row.

    1. All fit into the window: plain causal attention.
    2. A first forward longer than the window: it attends to itself.
    3. A full window and few new tokens: room is made first, so that W tokens are visible in all.
    4. More new tokens than the ring holds: the sinks and the new tokens.

    Where whole messages or images have left, tokens count from there on: "n" is without those.
    Where the newest RoPE position would reach `horizon`, the clock is set back so that the cache starts at 0 again.
    """
    past, shift = _visible(row.seen - row.dropped, new, window_length, num_sink_tokens)
    shift = row.shift(shift + row.dropped, num_sink_tokens)
    newest_position = row.seen - row.lag + new - 1 - row.base
    base = shift if newest_position >= horizon and shift > row.base else row.base
    return RowPlan(row.seen, new, past, shift, base, turn=base - row.base, dropped=row.dropped, lag=row.lag)


def _visible(seen: int, new: int, window_length: int, num_sink_tokens: int) -> tuple[int, int]:
    """Cached tokens that the forward sees, and how far the sinks walk forward to stand just before the others."""
    evicted = seen + new - window_length
    if evicted <= 0:  # rule 1
        return seen, 0
    if new <= window_length - num_sink_tokens:  # rule 3
        return window_length - new, evicted
    sinks = min(seen, num_sink_tokens)  # rule 4, and with seen == 0 rule 2
    return sinks, seen - sinks


def held(row: Row, window_length: int, num_sink_tokens: int) -> tuple[int, int]:
    """How many of the first tokens of a row are in its window, and how many of the newest ones behind them."""
    sinks = min(row.seen, num_sink_tokens)
    return sinks, min(row.seen - row.dropped, window_length) - sinks
