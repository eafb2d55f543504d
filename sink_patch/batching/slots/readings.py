"""How requests are read that begin anew or in a kept slot: in the forwards in which `generate` reads such a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import nn

from sink_patch.batching.service import Service
from sink_patch.batching.slots.entries import Found
from sink_patch.batching.slots.streams import Model, Reading, limit_of, prompt_of, stream_of
from sink_patch.generation.inputs.cuts import Text
from sink_patch.kept.sameness import settings_of, weights_of
from sink_patch.kept.store import store
from sink_patch.kept.texts import tokens_ahead


class ModelNow:
    """The model of a manager as it is in a batch, looked at once for each batch that asks.

    Args:
        model: which is not held; None: there is none any more.
    """

    def __init__(self, model: Callable[[], nn.Module | None]):
        self._model = model
        self._seen: tuple[Model | None] | None = None

    def begin_batch(self) -> None:
        self._seen = None

    def look(self) -> Model | None:
        """None: it cannot be seen, or other processes hold parts of it."""
        if self._seen is None:
            settings, model = self.settings(), self._model()
            weights = None if settings is None or model is None else weights_of(model)
            if weights is None or settings is None or model is None:
                self._seen = (None,)
            else:
                self._seen = ((weights + repr(store.times_cleared(model)).encode(), settings),)
        return self._seen[0]

    def settings(self) -> bytes | None:
        """Its settings at this moment."""
        model = self._model()
        is_shared = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return None if model is None or is_shared else settings_of(model)


class Readings:
    """How requests are read.

    Args:
        service: what is served.
        model: as it is.
        batch_tokens: of the largest batch.
    """

    def __init__(self, service: Service, model: ModelNow, batch_tokens: int):
        self._service, self._model, self._batch_tokens = service, model, batch_tokens

    def fresh(self, state: Any) -> Text:
        """A request that is read from its first token on, where the model can be seen."""
        prompt = prompt_of(state)
        return self._service.fresh(prompt, limit_of(state)) if self._keeps(state) else Text(prompt)

    def of(self, state: Any, found: Found | None) -> Reading:
        """A request that begins now, anew or in a kept slot."""
        fresh, prompt = self.fresh(state), prompt_of(state)
        model = self._model.look() if self._keeps(state) else None
        if model is None:
            plain = Text(prompt)
            return Reading(fresh if self.too_long(plain) else plain)
        if found is None:
            return Reading(fresh, model, fresh.pause or None)
        needs_copy, begin = limit_of(state) > self._service.fewest, found.tokens
        ahead = tokens_ahead(prompt - begin, begins_at_end=found.begins_at_end) if needs_copy else 0
        at_end = found.begins_at_end and needs_copy and not ahead
        copy_at = begin + ahead if needs_copy else None
        return Reading(Text(prompt, begin, begin + ahead), model, copy_at, at_end, found.goes_back)

    def too_long(self, text: Text) -> bool:
        """Whether no batch has room for a forward of it."""
        return bool(self._service.too_long(text, self._batch_tokens))

    def _keeps(self, state: Any) -> bool:
        return bool(self._service.keep) and not stream_of(state).is_one_of_many
