"""`SinkCache`: attention sinks and a window of the newest tokens, for ever.

Source: StreamingLLM, arXiv 2309.17453, section 3. The cache holds the first `num_sink_tokens` tokens of each stream and
the newest `window_length - num_sink_tokens`; positions are positions within the cache.
"""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sink_patch.arguments import Sizes
from sink_patch.buffers.layers import attributes_of
from sink_patch.cache import files
from sink_patch.cache.binding import bind, check_holds_nothing, new_streams, tie
from sink_patch.cache.packing import tensors_in
from sink_patch.cache.transformers_cache import TransformersCache
from sink_patch.errors import CacheStateError, SinkArgumentError, UnboundCacheError, UnpicklableCacheError
from sink_patch.history import windows
from sink_patch.models.entries import unwrapped

if TYPE_CHECKING:
    from typing_extensions import Self


class SinkCache(TransformersCache):
    """A cache of fixed size with which a model generates without end.

    Args:
        window_length: tokens that are kept, sinks counted in.
        num_sink_tokens: how many of the first tokens of each row are kept for good.
        evict: what leaves a full window: the oldest token ("tokens"), or the oldest whole message behind the sinks
            ("turns").
        turn_start: with "turns", the token ids that begin a message in the chat template; one run of ids, or several.
        model: the model that will use it; `generate` binds a cache that has none.

    `get_seq_length()` counts all columns ever fed, and `attention_mask` covers the whole stream, as with any cache of
    transformers; `position_ids` are set by the cache. Rows are streams of their own; padding to the left of a row's
    tokens is dropped. Gradients do not flow into the cache. It may be fed, cropped, copied and saved between forwards,
    not in the middle of one.

    Raises:
        SinkArgumentError: impossible sizes.
        UnsupportedModelError: the model cannot stream.
    """

    def __init__(
        self,
        window_length: int = Sizes.window_length,
        num_sink_tokens: int = Sizes.num_sink_tokens,
        *,
        evict: str = Sizes.evict,
        turn_start: Any = (),
        model: nn.Module | None = None,
    ):
        super().__init__(Sizes(window_length, num_sink_tokens, evict, turn_start))
        if model is not None:
            self.bind(model)

    def __repr__(self) -> str:
        streams = self._streams
        bound = "unbound" if streams is None else f"model={streams.facts.model_class}, layers={len(self.layers)}"
        size = f"window_length={self.window_length}, num_sink_tokens={self.num_sink_tokens}"
        return f"{type(self).__name__}({size}, {bound}, seen={self.get_seq_length()})"

    @property
    def evict(self) -> str:
        """What leaves a full window: "tokens" or "turns"."""
        return self.sizes.evict

    @property
    def turn_start(self) -> tuple[tuple[int, ...], ...]:
        """The runs of ids that begin a message; none where single tokens leave."""
        return self.sizes.turn_start

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, without copies of the sinks that are turned, and without recurrent states."""
        return 0 if self._streams is None else self._streams.store.nbytes

    def window(self, ids: Any = None, attention_mask: Any = None) -> list[windows.Window]:
        """What the window of each row holds: its sinks, its newest tokens, and where messages begin (`turn_start`).

            >>> cache.window()[0]
            Window(sinks=range(0, 4), recent=range(812, 1064), turns=(812, 901, 1003))

        Layers with a sliding window of their own that is shorter hold the newest tokens alone. A cache that has read
        nothing has no rows.

        Args:
            ids: the whole text [rows, columns], with padding; it may go on behind what was read. Then places are
                columns of it, and `turns` are all in what was read. None: places count the tokens of a row from 0 on,
                and `turns` are those behind the sinks that are in the window.
            attention_mask: of the ids, [rows, columns], 1 for tokens. Where padding stands between tokens, as behind
                rows that ended before others, it counts as a part of the ranges around it.

        Raises:
            HistoryMismatchError: the ids do not begin with what was read.
            SinkArgumentError: ids or mask are of another shape, or a mask was given alone.
            CacheStateError: a forward is in progress, or tokens were lost.
        """
        if ids is None and attention_mask is not None:
            raise SinkArgumentError("attention_mask was given without ids. Give the ids of the whole text as well.")
        streams = self._streams
        if streams is None:
            return []
        streams.check_between_forwards("asked what it holds")
        streams.forward.check_whole()
        if streams.rows is None:
            return []
        if ids is None:
            return windows.remembered(streams.rows, self.sizes, streams.history)
        return windows.in_text(streams.rows, self.sizes, streams.history, ids, attention_mask)

    def bind(self, model: nn.Module) -> None:
        """Tie the cache to a model: find and prove its adapters, and let its forward know sink caches.

        Raises:
            UnsupportedModelError: the model cannot stream; neither the cache nor the model is changed.
            SinkArgumentError: the window does not fit the model's positions.
            CacheStateError: the cache holds the tokens of another model.
        """
        bind(self, unwrapped(model))

    def check(self, model: nn.Module) -> None:
        """Raise what `bind` would raise, and change nothing."""
        model = unwrapped(model)
        check_holds_nothing(self, model)
        new_streams(model, self.sizes)

    def save(self, path: files.PathLike) -> None:
        """Write the cache to a safetensors file, from which `load` goes on where it stands.

        A file that is there already is replaced when the new one is whole.

        Raises:
            CacheStateError: the cache has no model, has lost tokens, or is in the middle of a forward.
            CacheFileError: the file cannot be written.
        """
        streams = self._streams
        if streams is None:
            raise UnboundCacheError(
                f"{self!r} cannot be saved: it has no model, and so holds nothing. Make it with SinkCache(..., "
                "model=model)."
            )
        streams.check_between_forwards("saved")
        streams.forward.check_whole(f"{self!r} cannot be saved. ")
        model = streams.entrances[0]()
        if model is None:
            raise CacheStateError(f"{self!r} cannot be saved: its model is gone. Keep the model until it is saved.")
        files.write(path, model, streams)

    @classmethod
    def load(cls, path: files.PathLike, *, model: nn.Module) -> Self:
        """A cache from a file that `save` has written, bound to the model.

        Raises:
            CacheFileError: the file holds no whole cache, or one of another model.
            FileNotFoundError: there is no such file.
            UnsupportedModelError: the model cannot stream.
        """
        model = unwrapped(model)
        sizes, streams = files.load(path, model)
        cache = cls(**asdict(sizes))
        tie(cache, streams, model)
        return cache

    def clone(self) -> Self:
        """A copy that goes its own way with the same model.

        Raises:
            CacheStateError: a forward is in progress.
        """
        return copy.deepcopy(self)

    @torch.inference_mode(False)  # else the copy could not be written to outside it
    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy that shares no tensor with the cache, and belongs to the same model."""
        if self._streams is not None:
            self._streams.check_between_forwards("copied")
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        # states may hang on the graph of a forward with gradients, and such tensors refuse to be copied as a whole
        held = [tensor for layer in self.layers for tensor in tensors_in(attributes_of(layer))]
        memo.update((id(tensor), tensor.detach().clone()) for tensor in held)
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def __copy__(self) -> Self:
        """As deep as any: two caches on the same rings would be of no use."""
        return copy.deepcopy(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnpicklableCacheError.of(repr(self))
