"""The rows of a cache between forwards: what each has seen, and what may be done to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from sink_patch.arguments import Sizes
from sink_patch.buffers.rotation import Turn
from sink_patch.buffers.store import LayerStore
from sink_patch.errors import CacheStateError
from sink_patch.history.leaving import Leaving
from sink_patch.history.record import History
from sink_patch.models.facts import ModelFacts
from sink_patch.rules.plans import RowPlan
from sink_patch.rules.rows import Row
from sink_patch.streaming.forward import Forward, Phase

_SPARE_AT_ONCE = 16


class Rows:
    """The streams in the rows of a cache, between forwards.

    `rows` are the streams, None before the first forward, and a new list whenever one changes (see steps/ahead.py);
    `columns` those fed so far, padding counted in; `forward` the one in progress, which all verbs look at first;
    `recording`: what leaves the window must be able to come back, `recalled` tokens at least; `leaving` makes room.

    Args:
        sizes, store, facts: of the cache, its layers, and of its model.
    """

    def __init__(self, sizes: Sizes, store: LayerStore, facts: ModelFacts):
        self.sizes, self.store, self.facts = sizes, store, facts
        self.forward = Forward()
        self.recording, self.recalled, self.columns = False, 0, 0
        self.rows: Sequence[Row] | None = None
        self.history = History(max(sizes.window_length, store.slots.fewest))
        self.leaving = Leaving(sizes, self.history)

    def mask_of_past(self) -> torch.Tensor:
        """An attention mask over all columns fed so far, int64 [rows, columns]: padding counts as the oldest ones."""
        seen = torch.tensor([row.seen for row in self.rows or ()], device="cpu")[:, None]  # [rows, 1]
        return (torch.arange(self.columns, device="cpu")[None, :] >= self.columns - seen).long()

    def reset(self) -> None:
        """Forget all tokens.

        Raises:
            CacheStateError: a forward is in progress.
        """
        self.check_between_forwards("reset")
        self._reset()

    def select_rows(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, int64 [rows], in that order. With none of them, all is forgotten.

        Raises:
            CacheStateError: a forward is in progress.
        """
        self.check_between_forwards("given other rows")
        if self.rows is None or not len(indices):
            self._reset()
            return
        alike = all(row == self.rows[0] for row in self.rows)  # then there is no need to ask the device
        with self.forward.broken_unless_finished("The rows of this cache could not be selected to the end."):
            self.store.select_rows(indices)
            self.history.select_rows(indices)
            self.rows = [self.rows[0 if alike else row] for row in (range(len(indices)) if alike else indices.tolist())]

    def crop(self, count: int) -> bool:
        """Forget the newest `count` tokens of each row; False if tokens that would have to come back are gone.

        Raises:
            CacheStateError: a forward is in progress, or old tokens were lost.
        """
        return self.take_back([count] * len(self.rows or ()), count) is None

    def take_back(self, counts: Sequence[int], columns: int = 0) -> int | None:
        """Forget the newest tokens, so many of each row, and so many columns; the others hold padding then.

        Returns:
            The first row that would need tokens which are gone; then nothing has changed. None: it is done.

        Raises:
            CacheStateError: as for `crop`.
        """
        self.check_between_forwards("cropped")
        self.forward.check_whole()
        if self.rows is None or not any(counts):
            return None
        for number, (row, count) in enumerate(zip(self.rows, counts, strict=True)):
            if count and (self.facts.has_states or count < 0 or not row.can_lose(count, self.sizes.num_sink_tokens)):
                return number
        lost, window_length = zip(self.rows, counts, strict=True), self.sizes.window_length
        with self.forward.broken_unless_finished("Tokens could not be taken back from this cache to the end."):
            self._move_clock([row.without_newest(count, window_length) for row, count in lost])
            self.history.crop(counts)
            self.columns -= columns
        return None

    def record(self, tokens: int) -> None:
        """From now on keep what leaves the window for the newest `tokens` tokens, and for those of any one forward.

        Raises:
            CacheStateError: a forward is in progress, or old tokens were lost.
        """
        self.check_between_forwards("told to record its past")
        self.forward.check_whole()
        self.recording, self.recalled = True, max(self.recalled, tokens)
        self._have_spare(tokens)

    def stop_recording(self) -> None:
        """Give the room for that back.

        Raises:
            CacheStateError: a forward is in progress.
        """
        self.check_between_forwards("told not to record its past")
        self.recording, self.recalled = False, 0
        self.lay_out(0)

    def check_between_forwards(self, asked: str, called: nn.Module | None = None) -> None:
        """Raise inside a forward; one that was interrupted past all hooks is given up.

        Args:
            asked: what the cache is to be, for people: "cropped".
            called: the module that begins another forward; one that has stored nothing gives way to it.

        Raises:
            CacheStateError: a forward is in progress.
        """
        if not self.forward.in_progress:
            return
        gives_way = called is not None and self.forward.phase is Phase.PLANNED
        if not gives_way and self.forward.is_running(called):
            raise CacheStateError(
                f"This SinkCache cannot be {asked} in the middle of a forward over it, whose tokens would be lost. "
                "Wait for its end."
            )
        self._give_up()

    def _give_up(self) -> None:
        """Forget the forward in progress, which did not end. Tokens that it overwrote are lost."""
        step, phase = self.forward.step, self.forward.phase
        if step is None:
            return
        if self.rows is None:  # the first one: nothing of it need stay
            self._reset()
            return
        held, slots = zip(self.rows, step.plans, strict=True), self.store.slots
        self.rows = [row.after_failure(plan.new, slots) for row, plan in held]
        evicts = any(kind.evicts(plan) for kind in self.store.kinds for plan in step.plans)
        if (evicts and phase is Phase.STORING) or self.facts.has_states:
            self.forward.break_off("A forward with this cache failed half-way, after it had overwritten old tokens.")
        else:
            self.forward.done()

    def _reset(self) -> None:
        self.forward.break_off("This cache could not be reset to the end.")
        self.store.reset()
        self.rows, self.columns = None, 0
        self.history.reset()
        self.forward.done()

    def _have_spare(self, tokens: int) -> None:
        """Have so many spare slots, and some more, as each change of their number copies the cache."""
        if tokens > self.store.slots.spare:
            self.lay_out(-(-tokens // _SPARE_AT_ONCE) * _SPARE_AT_ONCE)

    def lay_out(self, spare: int) -> None:
        if all(kind.spare == spare for kind in self.store.kinds):
            return
        with self.forward.broken_unless_finished("The slots of this cache could not be laid out anew to the end."):
            self.store.lay_out(spare, self.rows or ())
            slots = self.store.slots
            self.history.keep_at_least(slots.fewest)
            self.rows = None if self.rows is None else [row.after_failure(0, slots) for row in self.rows]

    def _let_leave(self, rows: Sequence[Row]) -> None:
        """Bring what has not left to the front of the rings; the rows are then `rows`."""
        with self.forward.broken_unless_finished("Messages or images could not be taken out of this cache to the end."):
            self.store.move_to_front(self.rows or (), rows)
        self.rows = list(rows)

    def _set_clock(self, plans: Sequence[RowPlan]) -> None:
        """Turn all rings back where the newest position would reach the horizon."""
        if self.rows is not None and any(plan.turn for plan in plans):
            self._move_clock([replace(row, base=plan.base) for row, plan in zip(self.rows, plans, strict=True)])

    def _move_clock(self, moved: list[Row]) -> None:
        """Turn all rings by as much as the base of their row moves."""
        turn = Turn([row.base - new.base for row, new in zip(self.rows or (), moved, strict=True)])
        if any(turn.rows):
            with self.forward.broken_unless_finished("The clock of this cache could not be set to the end."):
                self.store.turn(turn)
        self.rows = moved
