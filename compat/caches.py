"""transformers' own caches: what their entries hold, how an empty one is made and read, and who cannot take one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

OWN = "on this transformers it keeps its past in a form of its own, not in a `Cache`"

Cached = tuple[Any, Any] | None
"""(keys, values) of one entry of a cache, [rows, heads, tokens, dim] each; None where it holds none."""

_SLIDING = ("sliding_attention", "chunked_attention")


@dataclass(frozen=True)
class Entry:
    """One entry of `cache.layers`.

    Args:
        layer_type: as in the config's `layer_types`; None where the config has none.
        attention: whether it holds keys and values, which become ours.
        state: whether it holds a recurrent or convolution state, which stays transformers' own.
        sliding_window: of the attention; None: full.
        number_of_states: recurrent or convolution states.
        unknown: the name of what it is, where that is none of these.
    """

    layer_type: str | None
    attention: bool = True
    state: bool = False
    sliding_window: int | None = None
    number_of_states: int = 1
    unknown: str | None = None


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


def dynamic_layers(config: Any) -> list[Any]:
    """Fresh layers of a `DynamicCache` for a text config (4.56 and newer)."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    layers = list(DynamicCache(config=config).layers)
    if layers or not config.num_hidden_layers:
        return layers
    # up to 5.12 `layer_types[: -num_kv_shared_layers]` leaves nothing where no layer shares another's keys
    full: Any = DynamicLayer
    window: Any = getattr(config, "sliding_window", None)
    sliding = functools.partial(DynamicSlidingWindowLayer, sliding_window=window)
    return [(sliding if layer_type in _SLIDING else full)() for layer_type in layer_types_of(config)]


def entries_of_layers(config: Any) -> list[Entry]:
    """Read off the classes of those layers."""
    layers = dynamic_layers(config)
    types = list(getattr(config, "layer_types", None) or [])
    types = types[: len(layers)] if len(types) >= len(layers) else [None] * len(layers)
    entries = []
    for layer, layer_type in zip(layers, types, strict=True):
        name = type(layer).__name__
        attention, state = _HOLDS.get(name, (False, False))
        window, states = getattr(layer, "sliding_window", None), getattr(layer, "number_of_states", 1)
        unknown = None if name in _HOLDS else name
        entries.append(Entry(layer_type, attention, state, window, states, unknown))
    return entries


def entries_of_types(config: Any, layer_types: Sequence[str | None]) -> list[Entry]:
    """From the types of the layers alone, where caches have no layers for them to be read off."""
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    known = (None, "full_attention", *_SLIDING)
    return [
        Entry(
            layer_type,
            sliding_window=window if layer_type in _SLIDING else None,
            unknown=None if layer_type in known else f"{layer_type} layer",
        )
        for layer_type in layer_types
    ]


def layer_types_of(config: Any) -> list[str | None]:
    """The types of all layers that have an entry: `layer_types`, else all sliding or all full (4.53 and newer)."""
    found = list(getattr(config, "layer_types", None) or [])
    sliding = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    types = found or ["sliding_attention" if sliding else "full_attention"] * config.num_hidden_layers
    shared = getattr(config, "num_kv_shared_layers", 0) or 0
    return types[: len(types) - shared]


def dynamic_cache(config: Any) -> Any:
    """4.56 and newer: with the layers that the config asks for."""
    from transformers.cache_utils import DynamicCache

    return DynamicCache(config=config)


def growing_cache(_config: Any) -> Any:
    """Up to 4.55: layers come as they are used."""
    from transformers.cache_utils import DynamicCache

    return DynamicCache()


def cached_layers(cache: Any) -> list[Cached]:
    """4.54 and newer: layers hold keys and values."""
    pairs = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
    return [_filled(keys, values) for keys, values in pairs]


def cached_lists(cache: Any) -> list[Cached]:
    """4.52 and 4.53: lists of tensors."""
    return [_filled(keys, values) for keys, values in zip(cache.key_cache, cache.value_cache, strict=True)]


def _filled(keys: Any, values: Any) -> Cached:
    empty = keys is None or values is None or not len(keys) or not keys.numel()
    return None if empty else (keys, values)


def no_layers(_config: Any) -> Sequence[Any]:
    """Where recurrent states are kept in caches of other kinds, none is mixed with attention."""
    return ()


def takes_any_cache(_model_class: type) -> str | None:
    """5.5 and newer: all models that stream at all take a `Cache`."""
    return None


def keeps_its_own_cache(model_class: Any) -> str | None:
    """Up to 5.4: models with recurrent states, and those that know tuples only, say so to `generate`."""
    if hasattr(model_class, "_supports_default_dynamic_cache"):
        # a class method from 4.54 on; before, a method that reads nothing but class attributes
        blank = object.__new__(model_class)  # not by a `__new__` that makes whole models (of FSDP)
        if not blank._supports_default_dynamic_cache():
            return OWN
    parameters = inspect.signature(model_class.forward).parameters
    return None if "past_key_values" in parameters else OWN
