"""What one row has read, in constant memory: digests of the older tokens, and the ids of the newest ones.

Tokens are hashed by blocks that begin at multiples of `BLOCK` in the stream, each digest over the one before it and the
ids of its block. So the digest of a beginning depends on its tokens alone, not on the forwards that brought them.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

BLOCK = 256  # tokens
DIGEST_SIZE = 16  # bytes
_MOST_MARKS = 64


class Mark(NamedTuple):
    """The digest of the first `tokens` tokens of a row, whole blocks."""

    tokens: int
    digest: bytes


START = Mark(0, bytes(DIGEST_SIZE))


@dataclass(frozen=True)
class RowHistory:
    """What one row has read.

    With blocks of 2 and at least 3 ids kept, after the tokens a b c d e f:

        marks    (0, ""), (2, digest of a b)      tokens before `newest`
        newest   c d e f                          ids of all others
        first    a b                              ids of the first block, to know a beginning by

    Args:
        marks: digests of beginnings, shortest first; of older ones fewer and fewer are kept. Behind the last of them
            `newest` begins.
        newest, first: ids.
    """

    marks: tuple[Mark, ...] = (START,)
    newest: array[int] = field(default_factory=lambda: array("q"))
    first: array[int] = field(default_factory=lambda: array("q"))

    @property
    def seen(self) -> int:
        """Tokens that the row has read."""
        return self.marks[-1].tokens + len(self.newest)

    def extended(self, ids: Iterable[int], keep: int) -> RowHistory:
        """With more tokens; of all of them the newest `keep` ids are kept at least, and less than a block more."""
        new = array("q", ids)
        newest, marks = self.newest + new, list(self.marks)
        folded = max(0, len(newest) - keep) // BLOCK * BLOCK
        for start in range(0, folded, BLOCK):
            marks.append(_next(marks[-1], newest[start : start + BLOCK]))
        while len(marks) > _MOST_MARKS:
            marks = [*marks[:-1:2], marks[-1]]
        return RowHistory(tuple(marks), newest[folded:], self.first + new[: BLOCK - len(self.first)])

    def without_newest(self, count: int) -> RowHistory | None:
        """Without the newest `count` tokens; None: that goes back behind the ids that are kept."""
        kept = len(self.newest) - count
        if kept < 0:
            return None
        return RowHistory(self.marks, self.newest[:kept], self.first[: max(0, self.seen - count)])

    def ends(self, first: int, newest: int) -> tuple[list[int], list[int]] | None:
        """The ids of so many of the first tokens and of so many of the newest ones; None: they are not known."""
        begin = self.first if self.marks[-1].tokens else self.newest
        if len(begin) < first or len(self.newest) < newest:
            return None
        return begin[:first].tolist(), self.newest[len(self.newest) - newest :].tolist()

    def difference(self, ids: Sequence[int]) -> range | None:
        """Where the first token lies that is not as it was read: one place, or several where ids are gone.

        None: there is none up to the end of the shorter one (of ids that end before `newest`: none at any mark).
        """
        given, mark = array("q", ids), START
        if (place := _first_difference(given, self.first)) is not None:
            return range(place, place + 1)
        for known in self.marks[1:]:
            if known.tokens > len(given):
                return None
            before = mark.tokens
            while mark.tokens < known.tokens:
                mark = _next(mark, given[mark.tokens : mark.tokens + BLOCK])
            if mark != known:
                return range(max(before, len(self.first)), known.tokens)
        place = _first_difference(given[mark.tokens :], self.newest)
        return None if place is None else range(mark.tokens + place, mark.tokens + place + 1)

    def common(self, ids: Sequence[int]) -> int:
        """How many of the first tokens are known to be as they were read."""
        where, length = self.difference(ids), len(ids)
        if where is not None:
            return where.start
        if length <= len(self.first) or length >= self.marks[-1].tokens:
            return min(length, self.seen)
        return max(len(self.first), *(mark.tokens for mark in self.marks if mark.tokens <= length))


def _first_difference(one: array[int], other: array[int]) -> int | None:
    """The first place at which they differ, None: there is none up to the end of the shorter one."""
    both = min(len(one), len(other))
    if one[:both] == other[:both]:
        return None
    return next(place for place in range(both) if one[place] != other[place])


def _next(mark: Mark, block: array[int]) -> Mark:
    """The mark behind one more block."""
    if sys.byteorder == "big":  # a file is read on any machine
        block = block[:]
        block.byteswap()
    digest = hashlib.blake2b(mark.digest + block.tobytes(), digest_size=DIGEST_SIZE).digest()
    return Mark(mark.tokens + len(block), digest)
