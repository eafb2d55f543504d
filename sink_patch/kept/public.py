"""`sink_patch.kept_streams`: what is kept, how much it may be, and how to forget it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from sink_patch.arguments import whole_number
from sink_patch.errors import SinkArgumentError
from sink_patch.kept.entry import bytes_of
from sink_patch.kept.store import Store, store
from sink_patch.models.entries import unwrapped


@dataclass(frozen=True)
class Shown:
    """A kept stream, for people.

    Args:
        model: the class of its model.
        tokens: that it has read.
        window_length, num_sink_tokens: of its cache.
        nbytes: of its caches, of which another stream may share one.
    """

    model: str
    tokens: int
    window_length: int
    num_sink_tokens: int
    nbytes: int


class KeptStreams:
    """The streams that `generate(..., keep_streams=N)` has kept in this process, the least recently used one first.

        for kept in sink_patch.kept_streams:
            print(kept.model, kept.tokens, kept.nbytes)
        sink_patch.kept_streams.limit_bytes(2**30)
        sink_patch.kept_streams.clear(model)

    `len(kept_streams)` is their number, `kept_streams.nbytes` what they take, `kept_streams.limit` what they may take.
    """

    def __init__(self, held: Store):
        self._held = held

    def __len__(self) -> int:
        return len(self._held.entries())

    def __iter__(self) -> Iterator[Shown]:
        for model, entry in self._held.entries():
            sizes = entry.sizes.window_length, entry.sizes.num_sink_tokens
            yield Shown(type(model).__name__, entry.tokens, *sizes, bytes_of(entry.caches))

    def __repr__(self) -> str:
        return f"<{len(self)} kept streams, {self.nbytes} of {self.limit} bytes>"

    @property
    def nbytes(self) -> int:
        """Bytes of all kept streams of all models."""
        return bytes_of(cache for _, entry in self._held.entries() for cache in entry.caches)

    @property
    def limit(self) -> int:
        """Bytes that all of them may take."""
        return self._held.limit

    def limit_bytes(self, limit: int) -> None:
        """From now on all kept streams of all models together take so many bytes at most; 4 GiB until this is called.

        Where there are more, those that were used least recently are forgotten. A stream that alone takes more is not
        kept.

        Raises:
            SinkArgumentError: not a number of bytes.
        """
        self._held.limit = whole_number("limit", limit, 2**30, "of bytes")

    def clear(self, model: Any = None) -> None:
        """Forget the kept streams of a model; of all models if none is given.

        Raises:
            SinkArgumentError: what is given is no model.
        """
        if model is not None and not isinstance(model, nn.Module):
            raise SinkArgumentError(
                f"model={model!r} is a {type(model).__name__}. Pass the model whose streams are to be forgotten, or "
                "nothing for those of all models."
            )
        self._held.clear(None if model is None else unwrapped(model))


kept_streams = KeptStreams(store)
"""Those of this process."""
