"""What keeps a cache for later: a copy in memory, or a file."""

from __future__ import annotations

import copy
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sink_patch.cache import files as storage
from sink_patch.cache.packing import tensors_in
from sink_patch.errors import CacheStateError, UnboundCacheError, UnpicklableCacheError
from sink_patch.models.entries import text_config, unwrapped
from sink_patch.models.examine import ModelFacts, examine
from sink_patch.streaming.streams import Streams

if TYPE_CHECKING:
    from typing_extensions import Self


class Keeping:
    """The part of `SinkCache` that copies it, and takes it to a file and back."""

    layers: list[Any]
    _facts: ModelFacts | None
    _streams: Streams | None
    _entrances: tuple[weakref.ref[nn.Module], ...]

    if TYPE_CHECKING:  # what `SinkCache` has

        def __init__(self, window_length: int = ..., num_sink_tokens: int = ...) -> None: ...
        def _new_layers(self, facts: ModelFacts, config: Any) -> list[Any]: ...
        def _new_streams(self, facts: ModelFacts, layers: list[Any]) -> Streams: ...
        def _tie(self, model: nn.Module, facts: ModelFacts, streams: Streams) -> None: ...

    def save(self, path: storage.Path_) -> None:
        """Write the cache to a safetensors file, from which `load` goes on where it stands.

        A file that is there already is replaced when the new one is whole.

        Raises:
            CacheStateError: the cache has no model, is spoilt, or is in the middle of a forward.
            CacheFileError: the file cannot be written.
        """
        if self._streams is None or self._facts is None:
            raise UnboundCacheError(
                f"{self!r} cannot be saved: it has no model, and so holds nothing. Make it with SinkCache(..., "
                "model=model)."
            )
        self._check_between_forwards("saved")
        if self._streams.broken is not None:
            raise CacheStateError(
                f"{self!r} cannot be saved. {self._streams.broken} Call reset() and feed the text again."
            )
        model = self._entrances[0]()
        if model is None:
            raise CacheStateError(f"{self!r} cannot be saved: its model is gone. Keep the model until it is saved.")
        storage.write(path, model, self._facts, self._streams)

    @classmethod
    def load(cls, path: storage.Path_, *, model: nn.Module) -> Self:
        """A cache from a file that `save` has written, bound to the model.

        Raises:
            CacheFileError: the file holds no whole cache, or one of another model.
            UnsupportedModelError: the model cannot stream.
        """
        saved, model = storage.read(path), unwrapped(model)
        facts = examine(model)
        saved.check(model, facts)
        cache = cls(*saved.sizes)
        layers = cache._new_layers(facts, text_config(model))
        saved.fill(layers, model)
        streams = cache._new_streams(facts, layers)
        saved.set(streams)
        cache._tie(model, facts, streams)  # last, as this puts hooks on the model
        return cache

    def clone(self) -> Self:
        """A copy that goes its own way with the same model.

        Raises:
            CacheStateError: a forward is under way.
        """
        return copy.deepcopy(self)

    @torch.inference_mode(False)  # else the copy could not be written to outside it
    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        self._check_between_forwards("copied")
        twin: Self = object.__new__(type(self))
        memo[id(self)] = twin
        # states may hang on the graph of a forward with gradients, and such tensors refuse to be copied as a whole
        held = [tensor for layer in self.layers for tensor in tensors_in(vars(layer))]
        memo.update((id(tensor), tensor.detach().clone()) for tensor in held)
        vars(twin).update(copy.deepcopy(vars(self), memo))
        if twin._streams is not None:
            twin._streams.forget_buffers()  # not on every device are copies of views views of the copy
        return twin

    def __copy__(self) -> Self:
        """As deep as any: two caches on the same rings would be of no use."""
        return copy.deepcopy(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnpicklableCacheError.of(repr(self))

    def _check_between_forwards(self, asked: str) -> None:
        if self._streams is not None and self._streams.step is not None:
            raise CacheStateError(
                f"{self!r} cannot be {asked} in the middle of a forward. Wait for its end; after one that was "
                "interrupted, feed on or call reset() first."
            )
