"""One kept stream: the caches of it, and how far a text goes on with them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from sink_patch.arguments import Sizes
from sink_patch.buffers.layers import attributes_of
from sink_patch.cache.packing import tensors_in
from sink_patch.cache.sink_cache import SinkCache
from sink_patch.history.rows import RowHistory
from sink_patch.kept import texts
from sink_patch.kept.prompts import TextPrompt
from sink_patch.kept.sameness import Digest
from sink_patch.streaming.bound import streams_of
from sink_patch.streaming.media.images import UNKNOWN


@dataclass(frozen=True, eq=False)
class KeptStream:
    """A stream that has ended, of one row. Neither of its caches ever changes: a call goes on in a copy.

    A prompt of a b c d, answered by x y z, of which the last one was not read:

        ended    a b c d x y
        before   a b            the prompt without its last tokens, for templates that write the answer anew

    Args:
        sizes: of both caches.
        settings: of the model (`settings_of`).
        prompt: tokens of the prompt that the answer followed.
        ended: after the answer.
        before: from before the answer, if it had to be copied: where no token has left the window, `ended` without its
            newest tokens does as well.
        begins_at_end: whether `before` is the end of the answer before, as `ended` was then.
    """

    sizes: Sizes
    settings: Digest
    prompt: int
    ended: SinkCache
    before: SinkCache | None = None
    begins_at_end: bool = False

    @property
    def tokens(self) -> int:
        """Tokens that the stream has read."""
        return history_of(self.ended).seen

    @property
    def caches(self) -> tuple[SinkCache, ...]:
        return (self.ended,) if self.before is None else (self.ended, self.before)

    def is_same_as(self, other: KeptStream) -> bool:
        """Whether both have read the same text in the same way, so that one of them is enough."""
        mine, theirs = (
            (one.sizes, one.settings, one.prompt, history_of(one.ended), images_of(one.ended), one.before is None)
            for one in (self, other)
        )
        return mine == theirs

    def is_continued_by(self, prompt: TextPrompt, went_on_in: SinkCache) -> bool:
        """Whether a prompt is this talk, some turns later, so that this entry is not needed any more.

        Args:
            prompt: that went on in one of the caches.
            went_on_in: which one.
        """
        if not prompt.begins_with(images_of(self.ended)):
            return False
        in_ended = went_on_in is self.ended
        return texts.is_continued_by(history_of(self.ended), self.prompt, prompt.text, in_ended=in_ended)


def history_of(cache: SinkCache) -> RowHistory:
    """What the one row of a kept cache has read."""
    rows = streams_of(cache).history.rows
    return rows[0] if rows else RowHistory()


def images_of(cache: SinkCache) -> tuple[str, ...]:
    """Digests of the images that it has read; one that is of no image where it is not known which they were."""
    rows = streams_of(cache).rows
    return () if not rows else rows[0].images if rows[0].knows_images else (UNKNOWN,)


def tokens_to_use(entry: KeptStream, cache: SinkCache, prompt: TextPrompt) -> int:
    """How many of the first tokens of a prompt need not be read again, if a call goes on in a copy of this cache.

    An answer that says what stands for an image has been read as words: a prompt with an image there has another
    beginning. What has left for tokens that are taken back, whole messages and images, would be missing.

    Args:
        cache: one of the two of the entry.
    """
    streams = streams_of(cache)
    row = streams.rows[0] if streams.rows and not streams.facts.has_states else None

    def can_lose(back: int) -> bool:
        return row is not None and not row.dropped and row.can_lose(back, cache.num_sink_tokens)

    if not prompt.begins_with(images_of(cache)):
        return 0
    same = texts.tokens_to_use(history_of(cache), prompt.text, can_lose)
    return same if prompt.stand.isdisjoint(prompt.text[entry.prompt : same]) else 0


def copy_to_go_on(cache: SinkCache, tokens: int, padding: int) -> SinkCache:
    """A copy of a kept cache that has read so many tokens, behind so many columns of padding."""
    twin = cache.clone()
    streams = streams_of(twin)
    streams.take_back([history_of(twin).seen - tokens])
    streams.columns = padding + tokens
    return twin


def bytes_of(caches: Iterable[SinkCache]) -> int:
    """Bytes of the tensors of some caches, each counted once; recurrent states are counted in."""
    once = {id(cache): cache for cache in caches}.values()
    states = itertools.chain(*(tensors_in(attributes_of(layer)) for cache in once for layer in cache.layers))
    return sum(cache.nbytes for cache in once) + sum(tensor.nbytes for tensor in states)
