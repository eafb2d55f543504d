"""What a cache is to the hooks and to our own files: its streams, once it is bound to a model."""

from __future__ import annotations

from torch import nn

from sink_patch.arguments import Sizes
from sink_patch.errors import UnboundCacheError
from sink_patch.streaming.streams import Streams


class StreamingCache:
    """What the hooks look for among the arguments of a forward: a cache that has streams, once it is bound."""

    sizes: Sizes
    _streams: Streams | None = None

    def is_bound_to(self, model: nn.Module) -> bool:
        """Whether the cache belongs to this model (or to the model that this decoder is a part of)."""
        return self._streams is not None and self._streams.is_bound_to(model)


def streams_of(cache: StreamingCache, caller: str = "model") -> Streams:
    """The streams of a cache: how our own files reach them.

    Args:
        caller: what needs them, for people: the class of a model.

    Raises:
        UnboundCacheError: the cache is bound to no model.
    """
    if cache._streams is None:
        raise UnboundCacheError.never(caller, cache.sizes.window_length, cache.sizes.num_sink_tokens)
    return cache._streams
