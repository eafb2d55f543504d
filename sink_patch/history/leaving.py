"""What leaves a full window as a whole: messages (`evict="turns"`), found by their ids, and images, which rows know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from sink_patch.arguments import TURNS, Sizes
from sink_patch.errors import SinkArgumentError, tell
from sink_patch.history.beginnings import first_beginning
from sink_patch.history.record import History
from sink_patch.history.rows import RowHistory
from sink_patch.rules.kinds import LayerKind
from sink_patch.rules.media import behind_image
from sink_patch.rules.rows import Row
from sink_patch.rules.turns import beginnings, needs_room, seen_by_sliding_windows


class Leaving:
    """Makes room for a forward by letting the oldest messages of a row leave, as few as will do, or an image.

    An image leaves when its first token would, unless it leaves with its message. Ids wait on the device, and to look
    at them is to wait for it. So that is done where messages make room only: once for what leaves; in each forward
    where one message is longer than the window, and single tokens leave.

    Args:
        sizes: of the cache.
        history: what its rows have read.
    """

    def __init__(self, sizes: Sizes, history: History):
        self._sizes, self._history = sizes, history
        self._longest = max(map(len, sizes.turn_start), default=0)
        self._has_asked = False  # whether the ids of messages come up at all

    def check_ids(self, inputs: torch.Tensor) -> None:
        """Refuse embeddings [rows, columns, hidden] where messages are to leave: they do not say where one begins.

        Raises:
            SinkArgumentError: as it says.
        """
        if self._sizes.evict == TURNS and inputs.ndim != 2:
            raise SinkArgumentError(
                f"inputs_embeds were given with a SinkCache of evict={TURNS!r}, which finds by their ids where "
                "messages begin. Pass input_ids, or use evict='tokens'. (Prompt tuning feeds embeddings too.)"
            )

    def single_tokens_leave(self, rows: Sequence[Row]) -> bool:
        """Whether neither messages nor images leave these rows, whatever they read next (but images)."""
        return self._sizes.evict != TURNS and not any(row.spans for row in rows)

    def with_room(
        self,
        rows: Sequence[Row],
        new: Sequence[int],
        inputs: torch.Tensor,
        kinds: Sequence[LayerKind],
        *,
        recalled: int,
    ) -> Sequence[Row]:
        """The rows once messages, or images, have left them for a forward; the same object where all stay.

        One mask serves all rows. So in a batch with sliding windows as many tokens stay as those see.

        Args:
            rows: before it.
            new: tokens that it brings to each.
            inputs: ids [rows, columns], the new ones last.
            kinds: of the layers.
            recalled: how many of the newest tokens must be held when it is over, as they may be taken back.
        """
        by_turns = self._sizes.evict == TURNS
        if self.single_tokens_leave(rows) or not any(map(self._needs_room, rows, new)):
            return rows
        ids, changed = inputs.tolist() if by_turns else [], list(rows)
        for number, (row, count) in enumerate(zip(rows, new, strict=True)):
            if not self._needs_room(row, count):
                continue
            stay = seen_by_sliding_windows(row, kinds) + count - self._sizes.num_sink_tokens if len(rows) > 1 else 0
            if by_turns:
                text = (self._history.rows or ())[number]
                row = self._without_messages(row, text, ids[number][-count:], max(recalled, stay))  # noqa: PLW2901
            changed[number] = self._without_image(row, count, stay) if row.dropped == rows[number].dropped else row
        return changed if changed != list(rows) else rows

    def _needs_room(self, row: Row, new: int) -> bool:
        return needs_room(row, new, self._sizes.window_length)

    def _where(self, row: Row, new: int, stay: int) -> range:
        return beginnings(row, new, self._sizes.window_length, self._sizes.num_sink_tokens, stay)

    def _without_image(self, row: Row, new: int, stay: int) -> Row:
        """Without the rest of the image of which the first token leaves. No image is taken back, so none need stay."""
        sinks, where = self._sizes.num_sink_tokens, self._where(row, new, stay)
        start = behind_image(row.spans, where, sinks, self._sizes.window_length - sinks)
        spans = tuple(span for span in row.spans if span[1] > (start or where.start))
        row = row if len(spans) == len(row.spans) else replace(row, spans=spans)
        return row if start is None else row.beginning_at(start, sinks)

    def _without_messages(self, row: Row, text: RowHistory, new: list[int], stay: int) -> Row:
        known = text.marks[-1].tokens  # where `newest` begins
        where = self._where(row, len(new), stay)
        behind = self._longest - 1  # tokens that may be missing to a run that has begun
        where = range(max(where.start, known, row.searched - behind), where.stop)
        if not where:
            return row
        ids = [*text.newest[where.start - known :], *new]
        place = first_beginning(ids, self._sizes.turn_start, range(len(where)))
        if place is None:
            self._tell_if_none(text, new)
            return replace(row, searched=min(where.stop + behind, row.seen))
        return row.beginning_at(where.start + place, self._sizes.num_sink_tokens)

    def _tell_if_none(self, text: RowHistory, new: list[int]) -> None:
        """Warn once where turn_start is in nothing that is known of a row: it may be of another template."""
        if self._has_asked:
            return
        self._has_asked = True
        known = [[*text.first], [*text.newest, *new]]
        if all(first_beginning(ids, self._sizes.turn_start, range(len(ids))) is None for ids in known):
            tell(
                f"No message begins in the text of this SinkCache of evict={TURNS!r}: turn_start="
                f"{self._sizes.turn_start} is not in it. Single tokens leave the window until one begins. Pass the ids "
                "that begin a message in the chat template of the model."
            )
