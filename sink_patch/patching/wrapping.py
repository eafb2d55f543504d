"""Wrappers around methods of classes that are not ours."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import wrapt


class _BoundWrapper(wrapt.BoundFunctionWrapper):  # type: ignore[type-arg]  # generic for type checkers only
    """Such a method of an object. Others keep it (PEFT, on its model), and copy and pickle it like any bound method."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Owner.method(model, ...): up to 2.4, wrapt gives a `wrapped` whose signature still has self
        if self._self_instance is None and self._self_binding == "function" and args:
            return self._self_parent.__get__(args[0], type(args[0]))(*args[1:], **kwargs)
        return super().__call__(*args, **kwargs)

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        owner = copy.deepcopy(self._self_instance, memo)
        return self._self_parent.__get__(owner, type(owner))

    def __reduce_ex__(self, _protocol: Any) -> Any:
        return getattr, (self._self_instance, self.__name__)


class _Wrapper(wrapt.FunctionWrapper):  # type: ignore[type-arg]
    """A method with our wrapper around it."""

    __bound_function_wrapper__ = _BoundWrapper


def wrap_once(owner: type, name: str, wrapper: Callable[..., Any], enabled: Callable[[], bool]) -> None:
    """Put a wrapper around a method, unless it is there already.

    Args:
        owner, name: of the method.
        wrapper: takes (wrapped, instance, args, kwargs).
        enabled: whether it is called, or else the method itself.
    """
    if not _is_wrapped(vars(owner)[name], wrapper):
        wrapt.wrap_object(owner, name, _Wrapper, (wrapper, enabled))


def _is_wrapped(function: Any, wrapper: Callable[..., Any]) -> bool:
    """Whether our wrapper is anywhere in the chain: another library may have wrapped the method before or after."""
    while function is not None:
        if getattr(function, "_self_wrapper", None) is wrapper:
            return True
        function = getattr(function, "__wrapped__", None)
    return False
