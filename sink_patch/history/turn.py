"""Whether what a call of `generate` gives goes on with what its cache has read."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sink_patch.errors import HistoryMismatchError
from sink_patch.history.rows import RowHistory
from sink_patch.rules.columns import Columns

_BEGINNING = 4
"""So many tokens like the first ones of a stream are no accident; nor are two, where there are no others."""

_END = 8
"""So many tokens like the newest ones of a stream are no accident."""


def check_turn(rows: Sequence[RowHistory], columns: Columns, ids: torch.Tensor, mask: torch.Tensor) -> None:
    """Refuse ids that do not go on with what was read.

    What is as long as the stream is its history, and must begin with all that was read. What is no longer than what was
    read, and has no mask over the whole stream, is new tokens alone; but not if it begins as the stream began, or holds
    the newest tokens that were read: then it is a history from which something was taken.

    Args:
        rows: what was read.
        columns: of the call.
        ids: as they were given, [rows, columns].
        mask: over the whole stream, [rows, columns], 1 for real tokens.

    Raises:
        HistoryMismatchError: with the row and the first token that differs.
    """
    given, mask = ids.cpu(), mask.cpu()
    mask = mask[:, mask.shape[1] - given.shape[1] :]
    for number, (row, row_ids, row_mask) in enumerate(zip(rows, given, mask, strict=True)):
        name = "input_ids" if len(rows) == 1 else f"row {number} of input_ids"
        old = slice(columns.read) if columns.is_history else slice(None)
        text: list[int] = row_ids[old][row_mask[old] != 0].tolist()
        if columns.is_history:
            _check_history(row, text, name, columns)
        elif columns.is_guessed:
            _check_new(row, text, name, columns)


def _check_history(row: RowHistory, text: Sequence[int], name: str, columns: Columns) -> None:
    where = row.difference(text)
    if where is not None:
        raise HistoryMismatchError.elsewhere(name, where, row.seen, columns.given)


def _check_new(row: RowHistory, text: Sequence[int], name: str, columns: Columns) -> None:
    """New tokens alone may not look like a history."""
    common = row.common(text)
    if common >= _BEGINNING or 1 < common == len(text):
        raise HistoryMismatchError.shorter(name, len(text), common, row.seen, columns.stream)
    end = row.newest[-_END:].tolist()
    if len(end) == _END and any(list(text[place : place + _END]) == end for place in range(len(text) - _END + 1)):
        raise HistoryMismatchError.trimmed(name, len(text), row.seen, columns.stream)
