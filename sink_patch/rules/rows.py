"""One row of a cache between two forwards: how much it has seen, and how much of that can be taken back."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sink_patch.rules.media import Place, Span, position_of


@dataclass(frozen=True)
class Slots:
    """How many slots there are: `fewest` of any layer, `spare` of them for tokens that have left the window.

    `local`: whether some layers have a sliding window of their own, which are the ones with the fewest.
    """

    fewest: int
    spare: int = 0
    local: bool = False


@dataclass(frozen=True)
class Row:
    """One stream between two forwards.

    Args:
        seen: tokens of the stream so far, padding not counted.
        base: how far the RoPE clock has been set back: a token's position is its absolute index minus `base`.
        recallable: how many of the newest tokens can be taken back although tokens have left the window for them.
        complete: whether nothing was overwritten since the last message or image left, so that any number of tokens
            behind the sinks can be taken back.
        dropped: tokens behind the sinks that have left in whole messages or images. What came behind them has moved to
            the front of the ring, so that there the row is as one that has read so many tokens fewer.
        searched: how many of the first tokens were looked through for a message that may become the first one behind
            the sinks, without finding one. 0 once tokens were taken back, as the next forward may be a shorter one.
        places: where positions are not indices, as images have saved some (rules/media.py); none: they are.
        sink_end: the largest coordinate of any sink in an image, plus 1; 0: there is none.
        images_end: index of the token behind the last image, where positions are indices; 0: there is none.
        spans: its images that may still be in the window, oldest first.
        images: digests of the images that it has read, in their order; "" for some that nobody has seen.

    With a window of 4 and 2 spare slots, 3 tokens leave a row complete; 7 tokens do not, and the newest 2 of them can
    be taken back, as the 2 tokens that left the window for them lie in the spare slots.
    """

    seen: int = 0
    base: int = 0
    recallable: int = 0
    complete: bool = True
    dropped: int = 0
    searched: int = 0
    places: tuple[Place, ...] = ()
    sink_end: int = 0
    images_end: int = 0
    spans: tuple[Span, ...] = ()
    images: tuple[str, ...] = ()

    @property
    def lag(self) -> int:
        """How far the position of the next token lies behind its index."""
        return self.seen - position_of(self.places, self.seen)

    @property
    def knows_images(self) -> bool:
        """Whether it is known which images it has read; files of before do not say it."""
        return "" not in self.images if self.images else not (self.images_end or self.places)

    def shift(self, steps: int, num_sink_tokens: int) -> int:
        """By how many positions the sinks walk forward to stand just before the token that is `steps` behind them."""
        if not self.places or not steps:
            return steps
        sinks = min(self.seen, num_sink_tokens)
        end = max(position_of(self.places, sinks), self.sink_end)
        return max(0, position_of(self.places, sinks + steps) - end)

    def after(self, new: int, slots: Slots) -> Row:
        """The row when `new` more tokens are stored."""
        recallable = min(slots.spare, self.recallable + new)
        changed = {"seen": self.seen + new, "recallable": recallable, "complete": self.stays_complete(new, slots)}
        row = object.__new__(Row)  # as `replace`, which takes longer, and this is done for each token
        vars(row).update(vars(self), **changed)
        return row

    def after_failure(self, new: int, slots: Slots) -> Row:
        """The row when a forward of `new` tokens has failed: their slots are overwritten, and they are not seen."""
        recallable = max(0, min(self.recallable, slots.spare - new))
        return replace(self, recallable=recallable, complete=self.stays_complete(new, slots), searched=0)

    def can_lose(self, count: int, num_sink_tokens: int) -> bool:
        """Whether the newest `count` tokens can be taken back. What has left as a whole does not come back."""
        held = self.seen - self.dropped - num_sink_tokens if self.dropped else self.seen
        # images do not come back, in parts or as the ids that stand for them
        held = min(held, self.seen - max(self.images_end, self.places[-1][0] if self.places else 0))
        return count <= held and (self.complete or count <= self.recallable)

    def without_newest(self, count: int, window_length: int) -> Row:
        """The row when they are taken back. A clock that would start behind the window goes back with them."""
        seen = self.seen - count
        base = min(self.base, max(0, seen - self.lag - window_length))
        recallable = max(0, self.recallable - count)
        return replace(self, seen=seen, base=base, recallable=recallable, searched=0)

    def beginning_at(self, start: int, num_sink_tokens: int) -> Row:
        """The row when all between the sinks and the token at `start` have left, in whole messages or images."""
        return replace(self, complete=True, dropped=start - num_sink_tokens)

    def stays_complete(self, new: int, slots: Slots) -> bool:
        """Whether `new` more tokens leave it complete; none leaves a sliding window of its own as a whole."""
        held = self.seen if slots.local else self.seen - self.dropped
        return self.complete and held + new <= slots.fewest
