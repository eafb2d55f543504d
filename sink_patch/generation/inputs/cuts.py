"""Where a text is cut into forwards, so that what is read does not depend on how much room a batch has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Cut:
    """What goes into the next forward of a text.

    Args:
        tokens: how many at most.
        whole: whether these must go in together; else any smaller number may.
    """

    tokens: int
    whole: bool


@dataclass(frozen=True)
class Text:
    """How far a text is known, and where the reading of it pauses.

    Args:
        prompt: its tokens.
        begin: how many of them were read before; the first forward begins there.
        pause: where a forward ends and another one begins, whatever the pieces are; `begin` or less: nowhere.
    """

    prompt: int
    begin: int = 0
    pause: int = 0

    @property
    def parts(self) -> tuple[range, ...]:
        """What is read up to the pause, and what is read behind it."""
        if not self.begin < self.pause < self.prompt:
            return (range(self.begin, self.prompt),)
        return range(self.begin, self.pause), range(self.pause, self.prompt)

    def part(self, seen: int) -> range:
        """The part in which a forward begins when so many tokens have been read."""
        first, *others = self.parts
        return others[0] if others and seen >= self.pause else first


@dataclass(frozen=True)
class Cuts:
    """The forwards in which `generate` reads a text: a prompt in pieces, then one token at a time.

    Until the window is full a forward sees all tokens (rule 1), so that the text may be cut anywhere. Behind that it
    matters: a piece sees itself. With a window of 8, 2 sinks, a context of 32 and a prompt of 20, which goes in at
    once, all 20 are one forward. With pieces of 6 there are four: 0 to 5, which may be cut anywhere, 6 to 11, 12 to 17
    and 18 to 19, which may not. Pieces count from where a part of the text begins.

    Args:
        window_length, num_sink_tokens: of the cache.
        context: tokens of a prompt that go in at once; longer ones go in by pieces of `window_length -
            num_sink_tokens`.
        piece: tokens of a piece, where that was asked for (`prefill_chunk_size`).
    """

    window_length: int
    num_sink_tokens: int
    context: int
    piece: int | None = None

    def size(self, text: Text) -> int:
        """Tokens of a piece of a prompt."""
        if self.piece is not None:
            return self.piece
        ring, new = self.window_length - self.num_sink_tokens, text.prompt - text.begin
        fits = new <= ring or new + min(self.num_sink_tokens, text.begin) <= self.context
        return new if fits else ring

    def free(self, text: Text) -> int:
        """How many of the first tokens may be cut anywhere: those of the forwards that end within the window."""
        if text.prompt <= self.window_length:
            return self.window_length
        start, size = text.part(self.window_length).start, self.size(text)
        return start + max(0, self.window_length - start) // size * size

    def next(self, seen: int, text: Text) -> Cut:
        """What goes in when `seen` tokens of a text have been read, its prompt first.

        A forward must be able to begin there (`is_between`).
        """
        free, end = self.free(text), text.part(seen).stop
        if seen < free:
            return Cut(min(free, end if end < text.prompt else free) - seen, whole=False)
        if seen >= text.prompt:
            return Cut(1, whole=True)
        return Cut(min(self.size(text), end - seen), whole=True)

    def is_between(self, seen: int, text: Text) -> bool:
        """Whether a forward may begin when so many tokens have been read."""
        if seen <= self.free(text) or seen >= text.prompt:
            return True
        return (seen - text.part(seen).start) % self.size(text) == 0

    def longest(self, text: Text) -> int:
        """Tokens of the longest forward that must go in as a whole."""
        return max((tokens for _, tokens in self._whole(text)), default=1)

    def positions(self, text: Text) -> int:
        """How many tokens such a forward sees at most: itself, and sinks where it is not the first."""
        return max((tokens + min(self.num_sink_tokens, seen) for seen, tokens in self._whole(text)), default=1)

    def _whole(self, text: Text) -> Iterator[tuple[int, int]]:
        """(seen, tokens) of the longest forwards that must go in as a whole."""
        free, size = self.free(text), self.size(text)
        for part in text.parts:
            first = max(part.start, min(free, part.stop))
            for seen in range(first, part.stop, size)[:2]:
                yield seen, min(size, part.stop - seen)
