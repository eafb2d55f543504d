"""Wrappers around methods of classes that are not ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import wrapt


def wrap_once(owner: type, name: str, wrapper: Callable[..., Any], enabled: Callable[[], bool]) -> None:
    """Put a wrapper around a method, unless it is there already.

    Args:
        owner, name: of the method.
        wrapper: takes (wrapped, instance, args, kwargs).
        enabled: whether it is called, or else the method itself.
    """
    if not _is_wrapped(vars(owner)[name], wrapper):
        wrapt.wrap_object(owner, name, wrapt.FunctionWrapper, (wrapper, enabled))


def _is_wrapped(function: Any, wrapper: Callable[..., Any]) -> bool:
    """Whether our wrapper is anywhere in the chain: another library may have wrapped the method before or after."""
    while function is not None:
        if getattr(function, "_self_wrapper", None) is wrapper:
            return True
        function = getattr(function, "__wrapped__", None)
    return False
