"""Where transformers cannot be patched, every request for the sink cache is refused; all else is as it was."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from sink_patch.arguments import CACHE_IMPLEMENTATION
from sink_patch.errors import UnsupportedTransformersError
from sink_patch.patching.state import state
from sink_patch.patching.wrapping import wrap_once

_PLACES = (
    # the first that is there: every config that asks for a cache is validated, also inside `generate`
    ("transformers.generation.configuration_utils", "GenerationConfig", "validate"),
    ("transformers.generation.utils", "GenerationMixin", "generate"),
)


def refuse_all(reason: str) -> None:
    """Raise `UnsupportedTransformersError` with `reason` wherever `cache_implementation="sink"` is asked for."""
    state.refusal = reason
    for module, owner, name in _PLACES:
        found = getattr(sys.modules.get(module), owner, None)
        if found is not None and name in vars(found):
            wrap_once(found, name, _refuse, _is_refusing)
            return


def stop_refusing() -> None:
    """Let transformers answer for itself again."""
    state.refusal = None


def _is_refusing() -> bool:
    return state.refusal is not None


def _refuse(wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    configs = (instance, getattr(instance, "generation_config", None), kwargs.get("generation_config"), *args)
    asked = [kwargs.get("cache_implementation"), *(getattr(one, "cache_implementation", None) for one in configs)]
    if CACHE_IMPLEMENTATION in [name for name in asked if isinstance(name, str)]:
        raise UnsupportedTransformersError(
            f"cache_implementation={CACHE_IMPLEMENTATION!r} was asked for, and sink_patch cannot provide it: "
            f"{state.refusal}"
        )
    return wrapped(*args, **kwargs)
