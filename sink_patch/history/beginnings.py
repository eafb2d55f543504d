"""Where messages begin, by the runs of ids that begin one in a chat template."""

from __future__ import annotations

from collections.abc import Sequence


def first_beginning(ids: Sequence[int], runs: Sequence[Sequence[int]], within: range) -> int | None:
    """The first index within a range, of step 1, at which one of the runs begins; None: there is none.

    A run counts where all of it is there.
    """
    firsts = {run[0] for run in runs}
    places = range(within.start, min(within.stop, len(ids)))
    return next((place for place in places if ids[place] in firsts and begins(ids, runs, place)), None)


def begins(ids: Sequence[int], runs: Sequence[Sequence[int]], place: int) -> int:
    """Length of the longest run that begins at a place; 0: none does."""
    found = (len(run) for run in runs if tuple(ids[place : place + len(run)]) == tuple(run))
    return max(found, default=0)
