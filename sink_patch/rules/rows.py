"""One row of a cache between two forwards: how much it has seen, and how much of that can be taken back."""

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

    Args:
        seen: tokens of the stream so far, padding not counted.
        base: how far the RoPE clock has been set back: a token's position is its absolute index minus `base`.
        recallable: how many of the newest tokens can be taken back although tokens have left the window for them.
        complete: whether nothing was ever overwritten, so that any number of tokens can be taken back.

    With a window of 4 and 2 spare slots, 3 tokens leave a row complete; 7 tokens do not, and the newest 2 of them can
    be taken back, as the 2 tokens that left the window for them lie in the spare slots.
    """

    seen: int = 0
    base: int = 0
    recallable: int = 0
    complete: bool = True

    def after(self, new: int, slots: Slots) -> Row:
        """The row when `new` more tokens are stored."""
        return Row(
            self.seen + new, self.base, min(slots.spare, self.recallable + new), self._stays_complete(new, slots)
        )

    def after_failure(self, new: int, slots: Slots) -> Row:
        """The row when a forward of `new` tokens has failed: their slots are overwritten, and they are not seen."""
        recallable = max(0, min(self.recallable, slots.spare - new))
        return Row(self.seen, self.base, recallable, self._stays_complete(new, slots))

    def can_lose(self, count: int) -> bool:
        """Whether the newest `count` tokens can be taken back."""
        return count <= self.seen if self.complete else count <= self.recallable

    def without_newest(self, count: int, window_length: int) -> Row:
        """The row when they are taken back. A clock that would start behind the window goes back with them."""
        seen = self.seen - count
        return Row(seen, min(self.base, max(0, seen - window_length)), max(0, self.recallable - count), self.complete)

    def _stays_complete(self, new: int, slots: Slots) -> bool:
        return self.complete and self.seen + new <= slots.fewest
