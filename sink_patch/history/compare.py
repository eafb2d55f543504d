"""Whether what a call of `generate` gives goes on with what a row has read, and how much of that stays."""

from __future__ import annotations

from collections.abc import Sequence

from sink_patch.errors import HistoryMismatchError
from sink_patch.history.rows import RowHistory

_BEGINNING = 4
"""So many tokens like the first ones of a stream are no accident; nor are two, where there are no others."""

_END = 8
"""So many tokens like the newest ones of a stream are no accident."""


def tokens_that_stay(
    row: RowHistory, name: str, ids: Sequence[int], real: Sequence[bool], read: int, pad: int | None
) -> int:
    """How many of the first tokens that a row has read are the first ones of its history.

    Behind them the row may have read what is none of its text: padding that `generate` fed after its end, or what only
    the mask calls padding now. A row has read a b E P P, as other answers were longer than its own, which ended with E:

        history and mask                       stay
        a b E P P P c d,  1 1 1 0 0 0 1 1      3
        P P P a b E c d,  0 0 0 1 1 1 1 1      3
        a b E P P P c d,  1 1 1 1 1 1 1 1      5, all

    Args:
        row: what was read.
        name: of the row, for people.
        ids: of the whole history, with padding.
        real: which of them are tokens.
        read: columns that the cache has read.
        pad: the id of padding.

    Raises:
        HistoryMismatchError: it has read another text.
    """
    text = [token for token, is_real in zip(ids, real, strict=True) if is_real]
    where = row.difference(text)
    same = min(row.seen, len(text)) if where is None else where.start
    rest = row.seen - same
    if rest == 0:
        return same
    if (where is None or len(where) == 1) and rest <= len(row.newest):
        tail = row.newest[-rest:].tolist()
        is_hidden = sum(real[:read]) < row.seen and tail == list(ids[read - rest : read])
        if is_hidden or all(token == pad for token in tail):
            return same
    raise HistoryMismatchError.elsewhere(name, range(same, same + 1) if where is None else where, row.seen, len(ids))


def check_new(row: RowHistory, name: str, ids: Sequence[int], stream: int) -> None:
    """Refuse ids that are no more than what was read, and so are new ones, if they look like a part of a history.

    That is, if they begin as the stream began, or hold the newest tokens that were read.

    Args:
        row: what was read.
        name: of the row, for people.
        ids: real tokens.
        stream: columns of the stream if they are new.

    Raises:
        HistoryMismatchError: they do.
    """
    common = row.common(ids)
    if common >= _BEGINNING or 1 < common == len(ids):
        raise HistoryMismatchError.shorter(name, len(ids), common, row.seen, stream)
    end = row.newest[-_END:].tolist()
    if len(end) == _END and any(list(ids[place : place + _END]) == end for place in range(len(ids) - _END + 1)):
        raise HistoryMismatchError.trimmed(name, len(ids), row.seen, stream)
