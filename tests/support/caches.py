"""Caches of transformers, created in the way of the installed version, and readings of ours."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel, cache_utils

from sink_patch import SinkCache
from sink_patch.compat import installed_shim
from sink_patch.streaming.bound import streams_of


def default_cache(model: PreTrainedModel, rows: int = 1, longest: int = 256) -> Any:
    """The cache that `generate` creates by default, for `rows` streams of up to `longest` tokens."""
    config = model.config.get_text_config(decoder=True)
    if (
        getattr(config, "cache_implementation", None) == "hybrid"
    ):  # these models cut their masks to size for this cache only
        return cache_utils.HybridCache(config, max_batch_size=rows, max_cache_len=longest, dtype=model.dtype)
    return installed_shim().probe_cache(config)


class BareCache(cache_utils.Cache):
    """An empty cache: a base class for the caches of tests."""

    is_compileable = False

    def __init__(self, layers: list[Any] | None = None) -> None:
        parameters = inspect.signature(cache_utils.Cache.__init__).parameters
        if "layers" in parameters:
            super().__init__(layers=layers or [])
        elif "layer_classes" in parameters:
            super().__init__(layer_classes=cache_utils.DynamicLayer)
            self.layers = []
        else:
            super().__init__()

    def get_seq_length(self, layer_idx: int = 0, *args: Any) -> int:
        return 0

    def get_max_cache_shape(self, layer_idx: int = 0) -> None:
        """None: no limit. 4.52 calls this on any cache."""


def pristine_sinks(cache: SinkCache, which: int) -> list[torch.Tensor | None]:
    """The sinks as the model made them, [rows, heads, num_sink_tokens, dim] for each layer.

    Args:
        which: 0: of the keys, 1: of the values.
    """
    store = streams_of(cache).store
    return [store.sinks.pristine_of(layer.rings[which]) for layer in store.sink_layers]
