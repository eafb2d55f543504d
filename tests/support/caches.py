"""Caches of transformers' own, made on every version in the way that it has."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel, cache_utils

from sink_patch import SinkCache
from sink_patch.compat import installed_shim
from sink_patch.streaming.streams import streams_of


def default_cache(model: PreTrainedModel, rows: int = 1, longest: int = 256) -> Any:
    """What `generate` would give a model that asks for nothing, for `rows` streams of `longest` tokens."""
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "cache_implementation", None) == "hybrid":  # models that cut their masks for no other cache
        return cache_utils.HybridCache(config, max_batch_size=rows, max_cache_len=longest, dtype=model.dtype)
    return installed_shim().probe_cache(config)


class BareCache(cache_utils.Cache):
    """A cache with nothing in it, for tests that bring all of it themselves."""

    is_compileable = False

    def __init__(self, layers: list[Any] | None = None) -> None:
        asked = inspect.signature(cache_utils.Cache.__init__).parameters
        if "layers" in asked:
            super().__init__(layers=layers or [])
        elif "layer_classes" in asked:
            super().__init__(layer_classes=cache_utils.DynamicLayer)
            self.layers = []
        else:
            super().__init__()

    def get_seq_length(self, layer_idx: int = 0, *args: Any) -> int:
        return 0

    def get_max_cache_shape(self, layer_idx: int = 0) -> None:
        """4.52 asks any cache: there is no end."""


def pristine_sinks(cache: SinkCache, which: int) -> list[torch.Tensor | None]:
    """The sinks as the model made them, [rows, heads, num_sink_tokens, dim] for each layer.

    Args:
        which: 0: of the keys, 1: of the values.
    """
    store = streams_of(cache).store
    return [store.sinks.pristine_of(layer.rings[which]) for layer in store.sink_layers]
