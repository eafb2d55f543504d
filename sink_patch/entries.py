"""The entries of a model's own cache: which of them hold attention, and of what kind."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sink_patch.errors import UnsupportedModelError


@dataclass(frozen=True)
class Entry:
    """One entry of `cache.layers`.

    Args:
        layer_type: as in the config's `layer_types`; None where the config has none.
        attention: whether it holds keys and values, which become ours.
        state: whether it holds a recurrent or convolution state, which stays transformers' own.
        sliding_window: of the attention; None: full.
        number_of_states: recurrent or convolution states.
    """

    layer_type: str | None
    attention: bool = True
    state: bool = False
    sliding_window: int | None = None
    number_of_states: int = 1


# layer classes of transformers (cache_utils.py) by what they hold: (attention, state)
_HOLDS = {
    "DynamicLayer": (True, False),
    "DynamicSlidingWindowLayer": (True, False),
    "LinearAttentionLayer": (False, True),
    "LinearAttentionAndFullAttentionLayer": (True, True),
    "LinearAttentionAndSlidingWindowAttentionLayer": (True, True),
    "DynamicIndexedLayer": (True, False),
    "DummyLayer": (False, False),
}


def text_config(model: Any) -> Any:
    """The config of the language model, also where it is a part of a larger one."""
    return model.config.get_text_config(decoder=True)


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT or torch.compile wrapper."""
    inner: Sequence[Any] = (getattr(model, "_orig_mod", None), getattr(model, "get_base_model", lambda: None)())
    return next((unwrapped(one) for one in inner if isinstance(one, nn.Module)), model)


def decoder_of(model: Any) -> nn.Module:
    """The part that takes the cache and builds masks: `get_decoder()`, except where that finds an output head."""
    candidates: list[nn.Module] = [model.get_decoder()] if hasattr(model, "get_decoder") else []
    candidates += [getattr(model, "base_model", model), model]
    names = ("past_key_values", "cache_params")
    return next((one for one in candidates if set(names) & set(inspect.signature(one.forward).parameters)), model)


def own_layers(config: Any) -> list[Any]:
    """Fresh layers of transformers' own cache for a text config."""
    from transformers.cache_utils import DynamicCache

    return list(DynamicCache(config=config).layers)


def read_entries(model: nn.Module) -> Sequence[Entry]:
    """All entries, in order.

    Raises:
        UnsupportedModelError: one of them is of a kind that is not known.
    """
    config = text_config(model)
    layers = own_layers(config)
    types = list(getattr(config, "layer_types", None) or [])
    types = types if len(types) == len(layers) else [None] * len(layers)
    entries = []
    for layer_idx, (layer, layer_type) in enumerate(zip(layers, types, strict=True)):
        name = type(layer).__name__
        if name not in _HOLDS:
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot stream with attention sinks: layer {layer_idx} of its cache is a "
                f"{name} ({layer_type}); only full and sliding-window attention and recurrent states are known."
            )
        attention, state = _HOLDS[name]
        window, states = getattr(layer, "sliding_window", None), getattr(layer, "number_of_states", 1)
        entries.append(Entry(layer_type, attention, state, window, states))
    return entries
