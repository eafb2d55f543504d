"""One row of a cache between two forwards: how much it has seen, and what of it can be taken back."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Slots:
    """How many slots there are: `fewest` of any layer, `spare` of them for tokens that have left the window."""

    fewest: int
    spare: int = 0


@dataclass(frozen=True)
class Row:
    """One stream between two forwards.

    `recallable` is how many of its newest tokens can be taken back although tokens have left the window for them;
    `complete` says that nothing was ever overwritten, so that any number can be.
    """

    seen: int = 0
    base: int = 0
    recallable: int = 0
    complete: bool = True

    def after(self, new: int, slots: Slots) -> Row:
        """The row when `new` more tokens are stored."""
        complete = self.complete and self.seen + new <= slots.fewest
        return Row(self.seen + new, self.base, min(slots.spare, self.recallable + new), complete)

    def spoilt(self, new: int, slots: Slots) -> Row:
        """The row when the slots of `new` more tokens are written, and these count for nothing."""
        complete = self.complete and self.seen + new <= slots.fewest
        return Row(self.seen, self.base, max(0, min(self.recallable, slots.spare - new)), complete)

    def can_lose(self, count: int) -> bool:
        """Whether the newest `count` tokens can be taken back."""
        return count <= self.seen if self.complete else count <= self.recallable

    def without(self, count: int, window_length: int) -> Row:
        """The row when they are; its clock goes on to where a window that is not full has it."""
        seen = self.seen - count
        return Row(seen, min(self.base, max(0, seen - window_length)), max(0, self.recallable - count), self.complete)
