"""What the rows of a cache have read, written down forward by forward without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch

from sink_patch.history.rows import RowHistory

Ids = torch.Tensor | list[int]  # int64 [rows, columns]; one column [rows] on the host
KEPT = 4096  # ids of a row, at least
_MOST_WAITING = 512  # columns
_NO_TOKEN = -(2**63)  # in place of padding


class History:
    """What the rows of a cache have read.

    Ids wait on the device, and rows change their order there; they come to the host and are hashed when somebody asks,
    or, before a forward, when there are many. What was fed as embeddings is not known: from then on nothing is, until
    the cache is reset.

    Args:
        keep: ids that are kept of each row at least: as many tokens as may ever be taken back.
    """

    def __init__(self, keep: int):
        self._keep = max(keep, KEPT)
        self.reset()

    def __getstate__(self) -> dict[str, Any]:
        """A copy has nothing on the device."""
        self._settle()
        return {**vars(self), "_fed": None}

    def reset(self) -> None:
        """Nothing has been read."""
        self._start(())

    def _start(self, rows: Sequence[RowHistory] | None) -> None:
        self._known = rows is not None
        self._rows = list(rows or ())  # before the tokens that wait
        self._order: torch.Tensor | None = None  # int64 [rows]: which of `_rows` a row was; None: the same
        self._waiting: list[Ids] = []
        self._columns = 0  # that wait
        self._unbroken = 0  # of the newest columns that wait, how many hold a token in each row
        self._fed: Ids | None = None
        self._new = 0

    @property
    def rows(self) -> Sequence[RowHistory] | None:
        """What each row has read, none at first; None: it is not known."""
        self._settle()
        return self._rows if self._known else None

    @rows.setter
    def rows(self, rows: Sequence[RowHistory] | None) -> None:
        self._start(rows)

    def keep_at_least(self, tokens: int) -> None:
        """From now on keep so many ids of each row."""
        self._keep = max(self._keep, tokens)

    def note(self, inputs: torch.Tensor, new: Sequence[int]) -> None:
        """A forward begins; it counts when it ends (`commit`).

        Args:
            inputs: ids [rows, columns], or embeddings [rows, columns, hidden].
            new: how many of the last columns are tokens, row by row.
        """
        self._fed = None
        if not self._known or inputs.ndim != 2:
            return
        if self._columns >= _MOST_WAITING:
            self._settle()
        self._new, columns = min(new), inputs.shape[1]
        if columns == self._new == 1 and inputs.is_cpu and type(inputs) is torch.Tensor:
            self._fed = [row[0] for row in inputs.tolist()]  # this waits for nothing, and takes less than a copy
            return
        # a copy: what `generate` hands over is a part of all ids, and would keep all of them
        fed = inputs.clone() if inputs.dtype == torch.long else inputs.to(torch.long)
        if self._new < columns:
            padding = torch.tensor([columns - count for count in new], device=fed.device)[:, None]  # [rows, 1]
            fed.masked_fill_(torch.arange(columns, device=fed.device)[None, :] < padding, _NO_TOKEN)
        self._fed = fed

    def commit(self) -> None:
        """The forward has ended."""
        if self._fed is None:
            self._start(None)
            return
        columns = _columns_of(self._fed)
        whole = self._new == columns
        self._unbroken = self._new + (self._unbroken if whole else 0)
        self._waiting.append(self._fed)
        self._columns += columns
        self._fed = None

    def select_rows(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, in that order."""
        if self._waiting:
            waiting = _joined(self._waiting)
            self._waiting = [waiting.index_select(0, indices.to(waiting.device))]
        if self._order is not None:
            self._order = self._order.index_select(0, indices.to(self._order.device))
        elif self._rows:
            self._order = indices.clone()

    def join(self, other: History) -> None:
        """The rows of another one come below; where those of one are not known, none are."""
        ours, theirs = self.rows, other.rows
        self.keep_at_least(other._keep)
        self._start(None if ours is None or theirs is None else [*ours, *theirs])

    def crop(self, counts: Sequence[int]) -> None:
        """Take back the newest tokens, so many of each row."""
        count = counts[0] if len(set(counts)) == 1 else None
        if count is None or count > self._unbroken:
            self._settle()
            self._each(lambda row, place: row.without_newest(counts[place]))
            return
        self._unbroken -= count
        self._columns -= count
        while count:
            newest = self._waiting.pop()
            if isinstance(newest, torch.Tensor) and newest.shape[1] > count:
                self._waiting.append(newest[:, :-count])
            count -= min(count, _columns_of(newest))

    def _settle(self) -> None:
        """Hash what waits."""
        if self._order is not None:
            self._rows = [self._rows[index] for index in self._order.tolist()]
            self._order = None
        if self._waiting:
            waiting = _joined(self._waiting).cpu()  # [rows, columns]
            self._rows = self._rows or [RowHistory()] * len(waiting)
            self._waiting, self._columns, self._unbroken = [], 0, 0
            self._each(lambda row, place: row.extended(_tokens(waiting[place]), self._keep))

    def _each(self, change: Callable[[RowHistory, int], RowHistory | None]) -> None:
        rows = [change(row, place) for place, row in enumerate(self._rows)]
        self._start(None) if None in rows else self._start([row for row in rows if row is not None])


def _columns_of(ids: Ids) -> int:
    return ids.shape[1] if isinstance(ids, torch.Tensor) else 1


def _joined(parts: Sequence[Ids]) -> torch.Tensor:
    """All of them, [rows, columns]."""
    tensors = list[torch.Tensor]()
    for kind, group in groupby(parts, type):
        some: list[Any] = list(group)
        tensors += [torch.tensor(some, device="cpu").T] if kind is list else some  # [columns, rows] to [rows, columns]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=1)


def _tokens(ids: torch.Tensor) -> list[int]:
    """Those of a row [columns], without padding."""
    found: list[int] = ids[ids != _NO_TOKEN].tolist()
    return found
