"""Shares of attention on the first tokens, from the attention weights that a model itself returns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from sink_patch.errors import UnsupportedModelError

_EAGER = "eager"


@dataclass(frozen=True, eq=False)
class Attention:
    """The attention of one layer in a forward over the beginning of a text.

    Args:
        layer: its number in the model, those without attention weights counted too.
        weights: shape [heads, queries, keys]; 0 where a key is not seen.
    """

    layer: int
    weights: torch.Tensor

    @property
    def mean_map(self) -> torch.Tensor:
        """The mean over the heads, shape [queries, keys]."""
        return self.weights.mean(0)

    def share(self, first: int) -> torch.Tensor:
        """Share on the first tokens, shape [heads]: the mean over the second half of the queries."""
        return self._later()[:, :, :first].sum(-1).mean(-1)

    def elsewhere(self) -> torch.Tensor:
        """Share on nothing in the text, shape [heads]: on sinks that the model has learned (gpt-oss), else 0."""
        return (1 - self._later().sum(-1)).clamp(min=0).mean(-1)

    def _later(self) -> torch.Tensor:
        """Those of the second half of the queries, which all see many tokens: shape [heads, queries / 2, keys]."""
        return self.weights[:, self.weights.shape[1] // 2 :]


def of_text(model: Any, ids: torch.Tensor) -> list[Attention]:
    """The attention of all layers in one forward without a cache.

    Args:
        model: a causal language model of transformers.
        ids: token ids, shape [tokens].

    Raises:
        UnsupportedModelError: the model returns no attention weights.
    """
    with torch.inference_mode(), _eager(model):
        found = model(ids[None].to(model.device), output_attentions=True, use_cache=False).attentions
    tokens = len(ids)
    layers = [
        Attention(layer, weights[0].float().cpu())
        for layer, weights in enumerate(found or ())
        if weights is not None and weights.dim() == 4 and weights.shape[-2:] == (tokens, tokens)
    ]
    if not layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} returns no attention weights for output_attentions=True, so nothing can be said "
            "of where they lie. Give a model of transformers with softmax attention."
        )
    return layers


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """Attention in plain operations, which alone returns its weights."""
    before = model.config._attn_implementation
    _switch(model, _EAGER)
    try:
        yield
    finally:
        _switch(model, before)


def _switch(model: Any, implementation: str) -> None:
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation(implementation)
    else:  # older models read it from their config in each forward
        model.config._attn_implementation = implementation
