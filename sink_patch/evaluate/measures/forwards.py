"""Forwards of models of all families: the logits that are wanted, and a cache under whatever name a model takes it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

_CACHE_NAMES = ("cache", "past_key_values", "cache_params")  # by the version of transformers and the model


def cache_name(model: Any) -> str:
    """What the forward of a model calls its cache."""
    parameters = inspect.signature(model.forward).parameters
    return next(name for name in _CACHE_NAMES if name in parameters)


class Forwards:
    """Forwards of one model.

    Args:
        model: a causal language model of transformers.
    """

    def __init__(self, model: Any):
        self.model = model

    @cached_property
    def _cache_name(self) -> str:
        return cache_name(self.model)

    @cached_property
    def _keeps(self) -> bool:
        """Whether the model can leave out the logits that are not wanted."""
        return "logits_to_keep" in inspect.signature(self.model.forward).parameters

    def __call__(
        self, ids: torch.Tensor, wanted: Sequence[int], cache: Any = None, **options: Any
    ) -> tuple[torch.Tensor, Any]:
        """A forward with the logits that are wanted alone: in a small model the output layer takes half the time.

        Args:
            ids: token ids, shape [rows, tokens].
            wanted: indices of tokens.
            cache: of transformers or ours; None: none is given.
            options: other arguments of the model's forward.

        Returns:
            Logits, shape [rows, wanted, vocabulary], and the cache that the model gives back, or None.
        """
        if cache is not None:
            options[self._cache_name] = cache
        if self._keeps:
            options["logits_to_keep"] = torch.tensor(wanted, dtype=torch.long)
        output = self.model(ids, **options)
        logits: torch.Tensor = output.logits
        plain = dict(output.items())  # without the old names, which outputs of new versions still answer to
        returned = next((plain[name] for name in _CACHE_NAMES if name in plain), None)
        return logits if self._keeps else logits[:, wanted], returned
