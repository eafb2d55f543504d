"""What the windows of rows hold, as places in their texts: the sinks, the newest tokens, where messages begin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sink_patch.arguments import Sizes
from sink_patch.errors import HistoryMismatchError, SinkArgumentError
from sink_patch.history.beginnings import begins
from sink_patch.history.record import History
from sink_patch.rules.plans import held
from sink_patch.rules.rows import Row


@dataclass(frozen=True)
class Window:
    """What the window of one row holds now; `SinkCache.window` makes it.

    Args:
        sinks: the first tokens, which stay for good.
        recent: the newest tokens, behind what has left.
        turns: where messages begin, in rising order; None where that is not known: the cache has no `turn_start`, or
            was fed embeddings.
    """

    sinks: range
    recent: range
    turns: tuple[int, ...] | None = None

    @property
    def left(self) -> range:
        """What has left the window, and is forgotten."""
        return range(self.sinks.stop, self.recent.start)

    def __len__(self) -> int:
        """How many tokens it holds."""
        return len(self.sinks) + len(self.recent)


def remembered(rows: Sequence[Row], sizes: Sizes, history: History) -> list[Window]:
    """The windows of rows, whose tokens count from 0 on; turns are those that begin in `recent`.

    Without `turn_start` nothing waits for the device; with it, ids that were not looked at yet come from there.
    """
    texts = (history.rows or ()) if sizes.turn_start else ()
    windows = [_window(row, sizes) for row in rows]
    if len(texts) != len(windows):
        return windows
    found = []
    for window, text in zip(windows, texts, strict=True):
        known = text.marks[-1].tokens  # where `newest` begins, which is at `recent` or before
        places = range(window.recent.start - known, window.recent.stop - known)
        turns = (place + known for place in places if begins(text.newest, sizes.turn_start, place))
        found.append(replace(window, turns=tuple(turns)))
    return found


def in_text(rows: Sequence[Row], sizes: Sizes, history: History, ids: Any, attention_mask: Any) -> list[Window]:
    """The windows of rows as columns of their text; turns are all that begin in what was read.

    Args:
        ids: [rows, columns], which begin with what was read.
        attention_mask: [rows, columns], 1 for tokens; None: all are.

    Raises:
        SinkArgumentError: they are not of that shape, or of too few tokens.
        HistoryMismatchError: it is another text.
    """
    text = _table("ids", ids)  # [rows, columns]
    mask = torch.ones_like(text) if attention_mask is None else _table("attention_mask", attention_mask)
    if text.ndim != 2 or text.is_floating_point() or len(text) != len(rows) or mask.shape != text.shape:
        raise SinkArgumentError(
            f"ids of shape {list(text.shape)} were given, with a mask of {list(mask.shape)}, and the SinkCache has "
            f"{len(rows)} rows. Give the ids of the whole text, [rows, columns], and a mask of the same shape or none."
        )
    read, found = history.rows, []
    for number, row in enumerate(rows):
        columns: list[int] = (mask[number] != 0).nonzero()[:, 0].tolist()
        tokens: list[int] = text[number, columns].tolist()
        where = None if not read else read[number].difference(tokens)
        if where is not None:
            raise HistoryMismatchError.elsewhere(f"row {number} of ids", where, row.seen, text.shape[1])
        if len(tokens) < row.seen:
            raise SinkArgumentError(
                f"Row {number} of ids has {len(tokens)} tokens, and the SinkCache has read {row.seen}. Give the ids of "
                "the whole text, with the mask that tells tokens from padding."
            )
        found.append(_in_columns(_window(row, sizes), columns[: row.seen], tokens[: row.seen], sizes))
    return found


def _table(name: str, value: Any) -> torch.Tensor:
    try:
        return torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise SinkArgumentError(f"{name}={value!r} is no table: {error}. Give a tensor [rows, columns].") from error


def _window(row: Row, sizes: Sizes) -> Window:
    sinks, newest = held(row, sizes.window_length, sizes.num_sink_tokens)
    return Window(range(sinks), range(row.seen - newest, row.seen))


def _in_columns(window: Window, columns: Sequence[int], tokens: Sequence[int], sizes: Sizes) -> Window:
    """A window whose ranges count tokens as one whose ranges count columns: `columns` are those of the tokens."""
    turns = None
    if sizes.turn_start:
        turns = tuple(columns[place] for place in range(len(tokens)) if begins(tokens, sizes.turn_start, place))
    end = columns[-1] + 1 if columns else 0
    borders = [*columns, end]

    def moved(part: range) -> range:
        return range(borders[part.start], columns[part.stop - 1] + 1 if part else borders[part.start])

    return Window(moved(window.sinks), moved(window.recent), turns)
