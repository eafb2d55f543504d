"""Which columns of a call of `generate` are new to a cache."""

from __future__ import annotations

from dataclasses import dataclass

from sink_patch.errors import SinkArgumentError


@dataclass(frozen=True)
class Columns:
    """Columns of one call, padding counted in.

    A chat whose cache has read 10 columns goes on with 4 new ones. `generate` may be given all 14 of the history, as
    transformers wants it, or the 4 new ones with a mask over 14, or those 4 alone. In all three cases 14 columns are
    the stream, and the last 4 are new:

        given   told by the mask   stream   new   is_history
        14      14                 14       4     True
        4       14                 14       4     False
        4       4                  14       4     False

    Args:
        read: columns that the cache has read before the call.
        given: columns of the input ids, or of the embeddings.
        stream: columns of the stream, once the given ones are in.
        is_guessed: whether nothing but their number tells that the given ones are new.
    """

    read: int
    given: int
    stream: int
    is_guessed: bool = False

    @classmethod
    def of_call(cls, read: int, given: int, told: int | None) -> Columns:
        """From what the cache has read, what is given, and what the mask says (None: there is no mask).

        Columns that are no more than what the cache has read cannot be the history, so they are new ones.

        Raises:
            SinkArgumentError: the mask is neither over what is given nor over that behind what the cache has read.
        """
        told = given if told is None else told
        if told not in (given, read + given):
            raise SinkArgumentError(
                f"A mask (or positions) of {told} columns came with {given} columns of tokens, and the cache has read "
                f"{read}{': it is not known which of them are new' if read else ''}. Give a mask over the tokens that "
                f"are given{f', or over the whole stream ({read + given} columns)' if read else ''}; or none."
            )
        is_guessed = told <= read
        return cls(read, given, read + told if is_guessed else told, is_guessed)

    @classmethod
    def of_new(cls, read: int, given: int) -> Columns:
        """Where it is known that all columns that are given are new."""
        return cls(read, given, read + given)

    @property
    def new(self) -> int:
        """Columns that the cache has not read, the last ones of those that are given."""
        return self.stream - self.read

    @property
    def is_history(self) -> bool:
        """Whether the whole stream was given, and not its new columns alone."""
        return self.given == self.stream
