"""The doors to continuous batching: where a sink cache is asked for, requests are served with sinks, or refused.

What is asked for counts as in `generate` (`Request`): a keyword goes before the config that is passed, and that before
the model's own.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from sink_patch.arguments import CACHE_IMPLEMENTATION, Settings
from sink_patch.batching.managers import serve, service_for, service_of
from sink_patch.batching.service import INSTEAD, Service
from sink_patch.cache.sink_cache import SinkCache
from sink_patch.compat.shim import Role
from sink_patch.errors import UnsupportedGenerationError
from sink_patch.generation import refusals
from sink_patch.generation.request import Request
from sink_patch.models.entries import unwrapped
from sink_patch.streaming.media.given import media_among

Wrapped = Callable[..., Any]
_OF_CACHE = ("cache_implementation", "cache_config")


def init_continuous_batching(wrapped: Wrapped, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around `init_continuous_batching`, which begins to change the generation config, or has a manager already."""
    given = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    service = service_for(instance, given.get("generation_config"))
    _check_kept_manager(getattr(instance, "_cached_continuous_batching_manager", None), service)
    return wrapped(*args, **kwargs)


def make_manager(wrapped: Wrapped, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around `ContinuousBatchingManager.__init__`, which all ways to continuous batching reach."""
    given = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    service = service_for(given["model"], given["generation_config"])
    wrapped(*args, **kwargs)
    if service is not None:
        serve(instance, service)


def generate_batch(wrapped: Wrapped, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around `generate_batch`, which passes over keywords that it does not know.

    `generate(cache_implementation="paged")` comes here as well, with all that `generate` was given.
    """
    bound = inspect.signature(wrapped).bind(*args, **kwargs)
    others = bound.arguments.get("kwargs", {})
    if caches := [name for name, value in others.items() if isinstance(value, SinkCache)]:
        raise UnsupportedGenerationError(
            f"Continuous batching was asked for with a SinkCache in {caches[0]}, but it has a paged cache of its own. "
            f"Leave it out, and pass cache_implementation={CACHE_IMPLEMENTATION!r}. {INSTEAD}"
        )
    passed, own = bound.arguments.get("generation_config"), instance.generation_config
    request = Request.read(others, passed, own)
    service = service_for(instance, passed, others)
    if service is None:
        refusals.check_no_sizes(request, request.implementation)
        if request.of_call is not None:  # another cache than that of the model's own config
            bound.arguments["generation_config"] = _without_sinks(passed or own, request.of_call)
        return wrapped(*bound.args, **bound.kwargs)
    if media := media_among(unwrapped(instance), others):
        raise UnsupportedGenerationError(
            f"{', '.join(media)} was given to continuous batching with sinks, which takes prompts of text alone. Use "
            "generate."
        )
    _check_prompts(service, bound.arguments)
    if request.arguments or "cache_implementation" in others:
        bound.arguments["generation_config"] = _with_settings(passed or own, request)
        bound.arguments["kwargs"] = _without(others, (*_OF_CACHE, *Settings.names()))
    return wrapped(*bound.args, **bound.kwargs)


def make_handler(wrapped: Wrapped, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around `BaseHandler.__init__` of `transformers serve`: a model that is loaded at its start is looked at then."""
    wrapped(*args, **kwargs)
    if getattr(instance.generation_state, "_continuous_batching", False):
        for loaded in list(getattr(instance.model_manager, "loaded_models", {}).values()):
            if (model := getattr(loaded, "model", None)) is not None:
                service_for(model, None)


def _check_kept_manager(manager: Any, service: Service | None) -> None:
    """Refuse to serve by a manager that was kept on the model, and serves otherwise.

    Raises:
        UnsupportedGenerationError: as it says.
    """
    kept = None if manager is None else service_of(manager)
    if manager is None or (kept is None and service is None) or (service is not None and service.same_as(kept)):
        return
    asked, has = ("no sinks" if one is None else f"sinks ({one.kept})" for one in (service, kept))
    raise UnsupportedGenerationError(
        f"Continuous batching was asked for with {asked}, and the model keeps a manager whose paged cache has {has} "
        "(persistent_manager=True). Call model.destroy_cached_continuous_batching_manager() first."
    )


def _check_prompts(service: Service, given: Mapping[str, Any]) -> None:
    """Refuse prompts that no batch has room for, where its size was passed; else each request is refused by itself."""
    config = given.get("continuous_batching_config")
    for ids in given["inputs"]:
        service.check_prompt(service.fresh(len(ids)), getattr(config, "max_batch_tokens", None))


def _with_settings(config: Any, request: Request) -> Any:
    """A copy of a generation config that asks for the sink cache as a request does."""
    made = copy.deepcopy(config)
    made.cache_implementation, made.cache_config = CACHE_IMPLEMENTATION, request.settings().as_dict()
    for name in Settings.names():
        vars(made).pop(name, None)
    return made


def _without_sinks(config: Any, implementation: str) -> Any:
    """A copy of a generation config that asks for another cache."""
    made = copy.deepcopy(config)
    made.cache_implementation, made.cache_config = implementation, None
    return made


def _without(others: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in others.items() if name not in names}


WRAPPERS: dict[Role, Callable[..., Any]] = {
    Role.INIT_CONTINUOUS_BATCHING: init_continuous_batching,
    Role.MAKE_MANAGER: make_manager,
    Role.GENERATE_BATCH: generate_batch,
    Role.MAKE_HANDLER: make_handler,
}
"""Which wrapper goes around a method of continuous batching, by its role."""
