"""What is known of a slot that outlives its request, and how far a prompt goes on with it."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import torch

from sink_patch.batching.slots.streams import Model, Stream
from sink_patch.history.rows import RowHistory
from sink_patch.kept import texts


@dataclass(frozen=True, eq=False)
class Slot:
    """Blocks, and what has been read into them.

    Args:
        key: by which allocators know them.
        read: ids.
        is_complete: whether nothing in it was overwritten, so that the newest tokens can be taken back.
        base, shown, pristine: as of `Stream`.
    """

    key: Hashable
    read: RowHistory
    is_complete: bool
    base: int
    shown: int
    pristine: list[torch.Tensor]

    @classmethod
    def of(cls, key: Hashable, read: RowHistory, stream: Stream, *, is_complete: bool) -> Slot:
        return cls(key, read, is_complete, stream.base, stream.shown, stream.pristine)


@dataclass(eq=False)
class Entry:
    """A request that has ended, as `KeptStream` of generate.

    Args:
        model: as it was.
        prompt: tokens of the prompt that the answer followed.
        read: ids, in the end.
        begins_at_end: whether `before` is the end of the answer before.
        goes_back: whether it went on before the end of another one, as where templates write answers anew.
        ended, before: its slots; None: there is none, or its room was needed.
    """

    model: Model
    prompt: int
    read: RowHistory
    begins_at_end: bool
    goes_back: bool
    ended: Slot | None
    before: Slot | None

    @property
    def slots(self) -> tuple[Slot, ...]:
        return tuple(slot for slot in (self.ended, self.before) if slot is not None)

    @property
    def spare(self) -> Slot | None:
        """The one of two slots that the next turn will hardly go on in."""
        if self.ended is None or self.before is None:
            return None
        return self.ended if self.goes_back else self.before

    def let_go(self, slot: Slot) -> None:
        """Hold one of the slots no longer."""
        self.ended, self.before = (None if one is slot else one for one in (self.ended, self.before))

    def is_same_as(self, other: Entry) -> bool:
        """Whether both have read the same text, so that one of them is enough."""
        return (self.model, self.prompt, self.read) == (other.model, other.prompt, other.read)


@dataclass(frozen=True, eq=False)
class Found:
    """A slot that a prompt goes on with.

    Args:
        in_ended: whether that is the one of its end, not the one from before the answer.
        tokens: of the prompt that need not be read again.
        is_continued: whether the prompt is this talk, some turns later; else it is a branch of it.
        begins_at_end: whether it goes on where an answer ended.
    """

    entry: Entry
    slot: Slot
    in_ended: bool
    tokens: int
    is_continued: bool
    begins_at_end: bool

    @property
    def goes_back(self) -> bool:
        return self.is_continued and not (self.in_ended and self.tokens == self.slot.read.seen)


def search(entries: Iterable[Entry], text: array[int]) -> Found | None:
    """The slot with which a text goes on farthest."""
    best: tuple[int, Entry, Slot] | None = None
    for entry in entries:
        for slot in entry.slots:
            tokens = tokens_of(slot, text)
            if tokens > (best[0] if best else 0):
                best = tokens, entry, slot
    if best is None:
        return None
    tokens, entry, slot = best
    in_ended = slot is entry.ended
    is_continued = texts.is_continued_by(entry.read, entry.prompt, text, in_ended=in_ended)
    at_end = in_ended or (entry.begins_at_end and not is_continued)
    return Found(entry, slot, in_ended, tokens, is_continued, at_end and tokens == slot.read.seen)


def tokens_of(slot: Slot, text: array[int]) -> int:
    """How many of the first tokens of a text need not be read again if it goes on in a slot."""
    return texts.tokens_to_use(slot.read, text, lambda _back: slot.is_complete)
