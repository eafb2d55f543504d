"""Where transformers cannot be patched, asking for the sink cache is answered by us, and nothing else is touched."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import wrapt

from sink_patch.errors import UnsupportedTransformersError

_NAME = "sink"
_PLACES = (
    # the first that is there: every config that asks for a cache is validated, also inside `generate`
    ("transformers.generation.configuration_utils", "GenerationConfig", "validate"),
    ("transformers.generation.utils", "GenerationMixin", "generate"),
)
_reason: str | None = None


def put_up(reason: str) -> None:
    """Raise `UnsupportedTransformersError` with `reason` wherever `cache_implementation="sink"` is asked for."""
    global _reason
    _reason = reason
    for module, owner, name in _PLACES:
        found = getattr(sys.modules.get(module), owner, None)
        if found is not None and name in vars(found):
            if not isinstance(vars(found)[name], wrapt.FunctionWrapper):
                wrapt.wrap_object(found, name, wrapt.FunctionWrapper, (_refuse, _stands))
            return


def take_down() -> None:
    """Let transformers answer for itself again."""
    global _reason
    _reason = None


def reason() -> str | None:
    """Why transformers cannot be patched; None: it can, or nobody has tried."""
    return _reason


def _stands() -> bool:
    return _reason is not None


def _refuse(wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    configs = (instance, getattr(instance, "generation_config", None), kwargs.get("generation_config"), *args)
    asked = [kwargs.get("cache_implementation"), *(getattr(one, "cache_implementation", None) for one in configs)]
    if _NAME in [name for name in asked if isinstance(name, str)]:
        raise UnsupportedTransformersError(
            f"cache_implementation={_NAME!r} was asked for, and is not to be had: {_reason}"
        )
    return wrapped(*args, **kwargs)
