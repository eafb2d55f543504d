"""All kept streams of this process: found by their text, forgotten least recently used first."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from sink_patch.arguments import Sizes
from sink_patch.cache.sink_cache import SinkCache
from sink_patch.kept.entry import KeptStream, bytes_of, tokens_to_use
from sink_patch.kept.prompts import TextPrompt
from sink_patch.kept.sameness import Digest

LIMIT = 4 * 2**30
"""Bytes of all kept streams of a process, as long as nobody says otherwise."""


@dataclass
class _OfModel:
    """The kept streams of one model, all of the same weights."""

    weights: Digest
    entries: dict[KeptStream, int] = field(default_factory=dict)  # and when each was used, over all models


@dataclass(frozen=True)
class Found:
    """A kept stream that a text goes on with, the cache of it, and how many tokens of that are of use."""

    entry: KeptStream
    cache: SinkCache
    tokens: int


class Store:
    """Kept streams, by model. A model that nobody uses any more is forgotten with all of its streams.

    Streams of other weights are forgotten when a call finds that the weights have changed: they never become again what
    they were. Any thread may call any of this; what is kept never changes, so that no call ever waits for another one.
    """

    def __init__(self, limit: int = LIMIT):
        self._lock = threading.Lock()
        self._models: weakref.WeakKeyDictionary[nn.Module, _OfModel] = weakref.WeakKeyDictionary()
        self._clock = itertools.count()
        self._limit = limit
        self._cleared_all = 0
        self._cleared: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()

    def find(
        self, model: nn.Module, weights: Digest, settings: Digest, sizes: Sizes, prompt: TextPrompt
    ) -> Found | None:
        """The kept stream with which a prompt goes on farthest; it counts as used.

        Args:
            model: of transformers, unwrapped.
            weights, settings: of the model as it is now.
            sizes: of the cache that is asked for.
            prompt: the whole of it.
        """
        best: Found | None = None
        with self._lock:
            entries = self._entries(model, weights)
        for entry in entries:
            if entry.sizes != sizes or entry.settings != settings:
                continue
            for cache in entry.caches:
                tokens = tokens_to_use(entry, cache, prompt)
                if tokens > (best.tokens if best else 0):
                    best = Found(entry, cache, tokens)
        with self._lock:
            of_model = self._models.get(model)
            if best is not None and of_model is not None and best.entry in of_model.entries:
                of_model.entries[best.entry] = next(self._clock)
        return best

    def _entries(self, model: nn.Module, weights: Digest) -> Sequence[KeptStream]:
        of_model = self._models.get(model)
        if of_model is None or of_model.weights != weights:
            self._models[model] = of_model = _OfModel(weights)
        return list(of_model.entries)

    def put(
        self, model: nn.Module, weights: Digest, entry: KeptStream, most: int, in_place_of: KeptStream | None = None
    ) -> None:
        """Keep a stream; of this model's, no more than the `most` that were used last stay.

        Args:
            weights: as they were when the call began. If they are others by now, the stream is of no use.
            in_place_of: what need not be kept any longer.
        """
        with self._lock:
            of_model = self._models.get(model)
            if of_model is None or of_model.weights != weights or bytes_of(entry.caches) > self._limit:
                return
            for other in [held for held in of_model.entries if held is in_place_of or held.is_same_as(entry)]:
                del of_model.entries[other]
            of_model.entries[entry] = next(self._clock)
            while len(of_model.entries) > most:
                _forget_oldest([of_model])
            self._keep_to_limit()

    @property
    def limit(self) -> int:
        return self._limit

    @limit.setter
    def limit(self, limit: int) -> None:
        with self._lock:
            self._limit = limit
            self._keep_to_limit()

    def clear(self, model: nn.Module | None = None) -> None:
        """Forget the kept streams of a model; None: of all models."""
        with self._lock:
            if model is None:
                self._cleared_all += 1
            else:
                self._cleared[model] = self._cleared.get(model, 0) + 1
            for one in list(self._models.values()) if model is None else [self._models.get(model)]:
                if one is not None:
                    one.entries.clear()

    def times_cleared(self, model: nn.Module) -> int:
        """How often the streams of a model were forgotten on demand, for those who keep some elsewhere."""
        with self._lock:
            return self._cleared_all + self._cleared.get(model, 0)

    def entries(self) -> list[tuple[nn.Module, KeptStream]]:
        """All that is kept, each with its model, the least recently used one first."""
        with self._lock:
            held = [(used, m, entry) for m, of in self._models.items() for entry, used in of.entries.items()]
        return [(model, entry) for _, model, entry in sorted(held, key=lambda one: one[0])]

    def _keep_to_limit(self) -> None:
        while True:
            models = [of_model for of_model in self._models.values() if of_model.entries]
            if bytes_of(cache for of in models for entry in of.entries for cache in entry.caches) <= self._limit:
                return
            _forget_oldest(models)


def _forget_oldest(models: Sequence[_OfModel]) -> None:
    oldest = min(models, key=lambda of_model: min(of_model.entries.values()))
    del oldest.entries[min(oldest.entries, key=oldest.entries.__getitem__)]


store = Store()
"""That of this process."""
