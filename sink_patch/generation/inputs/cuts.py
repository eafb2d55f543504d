"""Where a text is cut into forwards, so that what is read does not depend on how much room a batch has."""

from __future__ import annotations

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
class Cuts:
    """The forwards in which `generate` reads a text: a prompt in pieces, then one token at a time.

    Until the window is full a forward sees all tokens (rule 1), so that the text may be cut anywhere. Behind that it
    matters: a piece sees itself. With a window of 8, 2 sinks, a context of 32 and a prompt of 20, which goes in at
    once, all 20 are one forward. With pieces of 6 there are four: 0 to 5, which may be cut anywhere, 6 to 11, 12 to 17
    and 18 to 19, which may not.

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

    def size(self, prompt: int) -> int:
        """Tokens of a piece of a prompt of so many tokens."""
        if self.piece is not None:
            return self.piece
        ring = self.window_length - self.num_sink_tokens
        return prompt if prompt <= max(ring, self.context) else ring

    def free(self, prompt: int) -> int:
        """How many of the first tokens may be cut anywhere: those of the forwards that end within the window."""
        if prompt <= self.window_length:
            return self.window_length
        size = self.size(prompt)
        return self.window_length // size * size

    def next(self, seen: int, prompt: int) -> Cut:
        """What goes in when `seen` tokens of a text have been read, the first `prompt` of which are its prompt.

        A forward must be able to begin there (`is_between`).
        """
        free = self.free(prompt)
        if seen < free:
            return Cut(free - seen, whole=False)
        if seen >= prompt:
            return Cut(1, whole=True)
        return Cut(min(self.size(prompt), prompt - seen), whole=True)

    def is_between(self, seen: int, prompt: int) -> bool:
        """Whether a forward may begin when so many tokens have been read."""
        return seen <= self.free(prompt) or seen >= prompt or seen % self.size(prompt) == 0

    def longest(self, prompt: int) -> int:
        """Tokens of the longest forward that must go in as a whole."""
        return min(self.size(prompt), max(1, prompt - self.free(prompt)))
