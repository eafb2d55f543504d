"""A turn of a chat whose cache has read the turns before: what was read must be the beginning of the history.

What a row has read behind that is taken back before the turn is fed: the padding of rows that ended before others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sink_patch.errors import CacheStateError
from sink_patch.history.compare import check_new, tokens_that_stay
from sink_patch.history.rows import RowHistory
from sink_patch.rules.columns import Columns
from sink_patch.rules.padding import tokens_hidden
from sink_patch.streaming.streams import Streams


@dataclass(frozen=True)
class Turn:
    """How much of what a cache has read stays.

    Args:
        columns: of the call, once all else is taken back.
        taken_back: tokens of each row.
        columns_back: columns.
    """

    columns: Columns
    taken_back: Sequence[int] = ()
    columns_back: int = 0

    @property
    def end_of_answer(self) -> int | None:
        """Columns of the stream up to the end of the answer before, of which `generate` feeds all but the last one."""
        read = self.columns.read + self.columns_back
        return read + 1 if 0 < read < self.columns.stream - 1 else None

    @classmethod
    def of_call(
        cls, streams: Streams, columns: Columns, inputs: torch.Tensor, mask: Any, generation_config: Any
    ) -> Turn:
        """From what the cache has read and what the call gives. What was fed as embeddings cannot be checked.

        Args:
            inputs: ids [rows, columns], or embeddings [rows, columns, hidden].
            mask: None, or [rows, columns of the stream], 1 for real tokens.
            generation_config: of the call.

        Raises:
            HistoryMismatchError: the ids do not go on with what was read; says in which row, and from which token on.
            CacheStateError: old tokens were lost.
        """
        streams.check_between_forwards("given another turn")
        streams.forward.check_whole()
        rows = streams.rows
        # an assistant gets all of its history for each draft, and its cache is nobody else's
        if not rows or len(rows) != len(inputs) or getattr(generation_config, "is_assistant", None):
            return cls(columns)
        if mask is None and not columns.is_history:
            return cls(columns)  # all of it is new, and nobody hides what was read
        if mask is None:
            past = streams.mask_of_past()  # [rows, read]
            mask = torch.cat((past, past.new_ones(len(rows), columns.new)), dim=1)
        if mask.shape != (len(rows), columns.stream):
            return cls(columns)  # the planner says what is wrong with it
        real, seen = mask.cpu() != 0, [row.seen for row in rows]
        read = None if inputs.ndim != 2 else streams.history.rows
        if read is not None and columns.is_history:
            return cls._of_history(read, columns, inputs.cpu(), real, _pad(generation_config))
        if read is not None and columns.is_guessed:
            _check_new(read, columns, inputs.cpu(), real)
        return cls(columns, tokens_hidden(real, seen, columns.read))

    @classmethod
    def _of_history(
        cls, read: Sequence[RowHistory], columns: Columns, ids: torch.Tensor, real: torch.Tensor, pad: int | None
    ) -> Turn:
        same = torch.tensor(
            [
                tokens_that_stay(row, _name(number, read), of_row, is_real, columns.read, pad)
                for number, (row, of_row, is_real) in enumerate(zip(read, ids.tolist(), real.tolist(), strict=True))
            ],
            device="cpu",
        )
        counts = real.cumsum(dim=1)[:, : columns.read]  # [rows, read]: tokens up to each column
        stay = int((counts <= same[:, None]).all(dim=0).sum())  # columns; those that do not fit are the last ones
        kept = counts[:, stay - 1].tolist() if stay else [0] * len(read)
        back = [row.seen - count for row, count in zip(read, kept, strict=True)]
        return cls(replace(columns, read=stay), back, columns.read - stay)

    def take_back(self, streams: Streams) -> None:
        """Take back what does not stay.

        Raises:
            CacheStateError: older tokens were overwritten by it, or it has entered recurrent states.
        """
        number = streams.take_back(self.taken_back, self.columns_back)
        if number is not None:
            raise CacheStateError(
                f"The newest {self.taken_back[number]} tokens that row {number} of this SinkCache has read do not stay "
                "as they were read: padding that generate fed after the end of the row, or what stands behind tokens "
                "that attention_mask now calls padding. They cannot be taken back, as older ones have left the window "
                "for them, or recurrent states have taken them in. Leave past_key_values out, and the text is read "
                "anew; or give each row a cache of its own; or call activate_past_recording(tokens) on the cache "
                "before its rows end at different times."
            )


def _check_new(read: Sequence[RowHistory], columns: Columns, ids: torch.Tensor, real: torch.Tensor) -> None:
    real = real[:, real.shape[1] - ids.shape[1] :]
    for number, row in enumerate(read):
        check_new(row, _name(number, read), ids[number][real[number]].tolist(), columns.stream)


def _name(number: int, rows: Sequence[RowHistory]) -> str:
    return "input_ids" if len(rows) == 1 else f"row {number} of input_ids"


def _pad(generation_config: Any) -> int | None:
    """The id of padding in a call."""
    pad = getattr(generation_config, "pad_token_id", None)
    return None if pad is None else int(pad)
