"""transformers' own caches: how an empty one is made, what it holds after a forward, and who cannot take one."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from sink_patch.compat.shim import Cached

OWN = "on this transformers it keeps its past in a form of its own, not in a `Cache`"


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
        blank = model_class.__new__(model_class)
        if not blank._supports_default_dynamic_cache():
            return OWN
    parameters = inspect.signature(model_class.forward).parameters
    return None if "past_key_values" in parameters else OWN
