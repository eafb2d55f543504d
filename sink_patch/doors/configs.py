"""The sizes of a sink cache in a `GenerationConfig`, which passes over names that it does not know.

This file imports neither torch nor transformers: it is needed when generation configs are imported, by clients too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sink_patch.arguments import CACHE_IMPLEMENTATION, Settings
from sink_patch.compat.shim import Role


def make_config(wrapped: Callable[..., Any], _instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Around `GenerationConfig.__init__`, which drops unknown names where `_from_model_config` is among the entries.

    A config that was made from that of a model says so, also in its file. There sizes beside
    `cache_implementation="sink"` are put into `cache_config`, which is kept. Without that they are dropped as ever: the
    names may be those of a model's config.
    """
    asks = kwargs.get("cache_implementation") == CACHE_IMPLEMENTATION
    sizes, held = Settings.given_in(kwargs), kwargs.get("cache_config") or {}
    if asks and sizes and kwargs.get("_from_model_config") and isinstance(held, Mapping):
        kwargs = {**kwargs, "cache_config": {**held, **sizes}}
    wrapped(*args, **kwargs)


def update_config(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Around `GenerationConfig.update`: the sizes are taken like entries that the class has, where they are not set.

    Returns:
        What was left over, now without the sizes.
    """
    unused: dict[str, Any] = wrapped(*args, **kwargs)
    lacked = {name: size for name, size in Settings.given_in(unused).items() if getattr(instance, name, None) is None}
    for name, size in lacked.items():
        setattr(instance, name, size)
    return {name: value for name, value in unused.items() if name not in lacked}


WRAPPERS: dict[Role, Callable[..., Any]] = {Role.MAKE_CONFIG: make_config, Role.UPDATE_CONFIG: update_config}
"""Which wrapper goes around a method of `GenerationConfig`, by its role."""
