"""What a row remembers, against a plain list of all that it has read."""

from __future__ import annotations

import sys
from array import array
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st

from sink_patch.history import rows
from sink_patch.history.rows import RowHistory

BLOCK, MARKS, KEEP = 4, 4, 6  # small, so that much is forgotten


def small(test):
    """With small blocks."""
    return mock.patch.multiple(rows, BLOCK=BLOCK, _MOST_MARKS=MARKS)(test)


IDS = st.integers(0, 5)
STEPS = st.lists(st.lists(IDS, max_size=9) | st.integers(1, 5), max_size=30)  # tokens that are read, or taken back


def followed(steps) -> tuple[RowHistory, list[int]]:
    row, read = RowHistory(), []
    for step in steps:
        if isinstance(step, list):
            row, read = row.extended(step, KEEP), read + step
        elif (shorter := row.without_newest(step)) is not None:
            row, read = shorter, read[: len(read) - step]
    return row, read


@small
@given(steps=STEPS)
@settings(deadline=None)
def test_it_has_read_what_it_has_read_in_constant_memory(steps):
    row, read = followed(steps)
    assert row.seen == len(read)
    assert row.newest.tolist() == read[len(read) - len(row.newest) :]
    assert row.first.tolist() == read[:BLOCK]
    assert len(row.newest) < KEEP + BLOCK
    assert len(row.marks) <= MARKS


@small
@given(steps=STEPS, more=st.lists(IDS, max_size=9), data=st.data())
@settings(deadline=None)
def test_it_says_where_another_text_differs(steps, more, data):
    row, read = followed(steps)
    assert row.difference(read + more) is None
    assert row.common(read + more) == len(read)
    for end in range(len(read)):
        assert row.difference(read[:end]) is None
        assert row.common(read[:end]) <= end
    if not read:
        return
    place = data.draw(st.integers(0, len(read) - 1))
    where = row.difference([*read[:place], 6, *data.draw(st.lists(IDS, max_size=60)), *[6] * len(read)])
    assert where is not None
    assert place in where
    if place < BLOCK or place >= row.marks[-1].tokens:
        assert len(where) == 1


@small
def test_one_token_that_differs_is_seen_wherever_it_stands():
    """All that follows is as it was read, and most blocks have no mark of their own."""
    read = [number % 6 for number in range(BLOCK * 10 * MARKS)]
    row = RowHistory().extended(read, KEEP)
    assert len(row.marks) <= MARKS
    for place in range(len(read)):
        where = row.difference([*read[:place], 6, *read[place + 1 :]])
        assert where is not None
        assert place in where


@small
@given(ids=st.lists(IDS, max_size=60), sizes=st.lists(st.integers(1, 9), max_size=60))
@settings(deadline=None)
def test_it_does_not_matter_which_forwards_bring_the_tokens(ids, sizes):
    by_parts, start = RowHistory(), 0
    for size in sizes:
        by_parts, start = by_parts.extended(ids[start : start + size], KEEP), start + size
    by_parts = by_parts.extended(ids[start:], KEEP)
    at_once = RowHistory().extended(ids, KEEP)
    assert (by_parts.marks[-1], by_parts.newest) == (at_once.marks[-1], at_once.newest)


@small
def test_digests_are_the_same_on_machines_of_another_byte_order(monkeypatch):
    ids = list(range(BLOCK + KEEP))
    here = RowHistory().extended(ids, KEEP)
    as_there = array("q", ids[:BLOCK])
    as_there.byteswap()  # what its memory holds
    monkeypatch.setattr(sys, "byteorder", {"little": "big", "big": "little"}[sys.byteorder])
    assert rows._next(rows.START, as_there) == here.marks[1]
