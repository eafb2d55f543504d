"""Whole messages leave: where the window of a row may begin, so that a forward finds room."""

from __future__ import annotations

from collections.abc import Iterable

from sink_patch.rules.kinds import LayerKind
from sink_patch.rules.rows import Row


def needs_room(row: Row, new: int, window_length: int) -> bool:
    """Whether `new` more tokens do not fit beside what a row holds."""
    return min(row.seen, new) > 0 and row.seen - row.dropped + new > window_length


def beginnings(row: Row, new: int, window_length: int, num_sink_tokens: int, stays: int = 0) -> range:
    """Absolute indices of which the first that begins a message is to stand behind the sinks in a forward of `new`.

    With a window of 8, 2 sinks and 8 tokens held, one more token needs a message that begins at 3 or later, so that the
    sinks, it and the new token are 8 at most; at the latest it begins with the new token, at 8. None where the new
    tokens alone do not fit beside the sinks.

    Args:
        stays: how many of the newest tokens, new ones counted in, must stay.
    """
    first = row.seen + new + num_sink_tokens - window_length
    last = min(row.seen, row.seen + new - stays)
    return range(first, last + 1)


def seen_by_sliding_windows(row: Row, kinds: Iterable[LayerKind]) -> int:
    """Cached tokens of a row that the layer with the longest window of its own sees in a forward."""
    return max((min(row.seen, kind.capacity - 1) for kind in kinds if kind.local), default=0)
