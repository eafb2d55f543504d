"""Continuous batching, which has a paged cache of its own and knows none of ours: refused at every door to it.

A `SinkCache` that a model stores in its generation config would be left out without a word, whatever config is passed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NoReturn

from sink_patch.arguments import CACHE_IMPLEMENTATION, Settings
from sink_patch.cache.sink_cache import SinkCache
from sink_patch.compat.shim import Role
from sink_patch.errors import UnsupportedGenerationError

Wrapped = Callable[..., Any]


def init_continuous_batching(wrapped: Wrapped, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around `init_continuous_batching`, which begins to change the generation config."""
    given = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    _check(given.get("generation_config"), instance)
    return wrapped(*args, **kwargs)


def make_manager(wrapped: Wrapped, _instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around `ContinuousBatchingManager.__init__`, which all ways to continuous batching reach."""
    given = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    _check(given["generation_config"], given["model"])
    return wrapped(*args, **kwargs)


def generate_batch(wrapped: Wrapped, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around `generate_batch`, which passes over keywords that it does not know.

    `generate(cache_implementation="paged")` comes here as well, with all that `generate` was given.
    """
    given = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    others = given.get("kwargs", {})
    if others.get("cache_implementation") == CACHE_IMPLEMENTATION:
        _refuse(f"cache_implementation={CACHE_IMPLEMENTATION!r}")
    if sizes := Settings.given_in(others):
        _refuse(" and ".join(f"{name}={size!r}" for name, size in sizes.items()))
    if caches := [name for name, value in others.items() if isinstance(value, SinkCache)]:
        _refuse(f"a SinkCache in {caches[0]}")
    _check(given.get("generation_config"), instance)
    return wrapped(*args, **kwargs)


def make_handler(wrapped: Wrapped, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around `BaseHandler.__init__` of `transformers serve`: a model that is loaded at its start is refused then."""
    wrapped(*args, **kwargs)
    if getattr(instance.generation_state, "_continuous_batching", False):
        for loaded in list(getattr(instance.model_manager, "loaded_models", {}).values()):
            _check(None, getattr(loaded, "model", None))


def _check(generation_config: Any, model: Any) -> None:
    """Refuse a sink cache in the generation config, or in that of the model.

    Raises:
        UnsupportedGenerationError: as it says.
    """
    configs = (generation_config, getattr(model, "generation_config", None))
    for config, where in zip(configs, ("in the generation config", "in the model's generation config"), strict=True):
        if getattr(config, "cache_implementation", None) == CACHE_IMPLEMENTATION:
            _refuse(f"cache_implementation={CACHE_IMPLEMENTATION!r} {where}")


def _refuse(asked: str) -> NoReturn:
    raise UnsupportedGenerationError(
        f"Continuous batching was asked for with {asked}, but it has a paged cache of its own, which keeps all tokens. "
        "Use generate (or serve without --continuous-batching); or leave it out and set "
        "model.generation_config.cache_implementation = None."
    )


WRAPPERS: dict[Role, Callable[..., Any]] = {
    Role.INIT_CONTINUOUS_BATCHING: init_continuous_batching,
    Role.MAKE_MANAGER: make_manager,
    Role.GENERATE_BATCH: generate_batch,
    Role.MAKE_HANDLER: make_handler,
}
"""Which wrapper goes around a method of continuous batching, by its role."""
