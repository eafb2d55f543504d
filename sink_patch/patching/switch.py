"""Patching transformers, and undoing it.

What is wrapped stays wrapped: undoing is a flag that every wrapper asks (`enabled`), since taking a wrapper off could
take another library's along. The public verbs hold the guards; the private ones do the work. All that is to be touched
is looked at first, so that a transformers of another shape is left as it was.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import wrapt

from sink_patch.compat import installed_shim
from sink_patch.compat.shim import Constant, Method, Shim
from sink_patch.errors import UnsupportedTransformersError, tell
from sink_patch.patching import refuse_all as barrier
from sink_patch.patching.autoload import arm, is_armed

_lock = threading.RLock()
_enabled = is_armed()
_ours: set[Constant] = set()  # entries that we have put into transformers, at any time


def patch() -> None:
    """Teach transformers `cache_implementation="sink"`. Twice is as good as once.

    Raises:
        UnsupportedTransformersError: this transformers cannot be patched; it is left as it was.
    """
    global _enabled
    with _lock:
        try:
            for change in list(_changes(installed_shim())):  # all are found before the first is made
                change()
            _enabled = True
            barrier.take_down()
            arm()
        except BaseException as failure:
            unpatch()
            if isinstance(failure, UnsupportedTransformersError):
                barrier.put_up(str(failure))
            raise


def unpatch() -> None:
    """Make transformers behave as if sink_patch were not there. Caches that exist go on working."""
    global _enabled
    with _lock:
        _enabled = False
        barrier.take_down()
        for constant in _ours:
            _remove(constant)


def is_patched() -> bool:
    """Whether `cache_implementation="sink"` is understood (or will be, as soon as transformers is imported)."""
    return _enabled


def when_imported(module: ModuleType) -> None:
    """Patch a module of transformers that has just been imported, unless `unpatch` was faster.

    A failure is a warning here: it must not break the import. Who asks for the sink cache all the same gets an error.
    """
    if (reason := barrier.reason()) is not None:
        barrier.put_up(reason)  # perhaps in the module that has just come
    if not is_patched():
        return
    try:
        patch()
    except UnsupportedTransformersError as failure:
        tell(f"{module.__name__} is not patched: {failure}")
        barrier.put_up(str(failure))
    except Exception as failure:
        tell(f"{module.__name__} is not patched: {failure}")


def _changes(shim: Shim) -> Iterator[Callable[[], None]]:
    """What is to be done to the modules that are imported so far.

    One may be in the middle of its import (torch is first imported from there): then what it lacks will come.

    Raises:
        UnsupportedTransformersError: something is not where it should be.
    """
    for constant in shim.constants:
        module = sys.modules.get(constant.module)
        if module is not None and _has(module, constant.name):
            yield lambda constant=constant: _add(constant)  # type: ignore[misc]
    for method in shim.methods:
        module = sys.modules.get(method.module)
        if module is not None and _has(module, method.owner):
            yield _wrapping(getattr(module, method.owner), method)


def _has(module: ModuleType, name: str) -> bool:
    if not hasattr(module, name) and not getattr(module.__spec__, "_initializing", False):
        raise UnsupportedTransformersError(_moved(f"{module.__name__}.{name}"))
    return hasattr(module, name)


def _add(constant: Constant) -> None:
    module = sys.modules[constant.module]
    held: Any = getattr(module, constant.name)
    if constant.entry not in held:
        setattr(module, constant.name, constant.added_to(held))
        _ours.add(constant)


def _remove(constant: Constant) -> None:
    module = sys.modules.get(constant.module)
    if module is not None and hasattr(module, constant.name):
        setattr(module, constant.name, constant.removed_from(getattr(module, constant.name)))


def _wrapping(owner: type, method: Method) -> Callable[[], None]:
    from sink_patch.generation import wrappers as generate

    original = vars(owner).get(method.name)
    if original is None or not set(method.parameters) <= set(inspect.signature(original).parameters):
        raise UnsupportedTransformersError(_moved(f"{method.owner}.{method.name}({', '.join(method.parameters)})"))
    wrapper = getattr(generate, method.role)

    def wrap() -> None:
        if not _is_wrapped(original, wrapper):
            wrapt.wrap_object(owner, method.name, wrapt.FunctionWrapper, (wrapper, is_patched))

    return wrap


def _is_wrapped(function: Any, wrapper: Any) -> bool:
    """Whether our wrapper is anywhere in the chain: another library may have wrapped it again."""
    while function is not None:
        if getattr(function, "_self_wrapper", None) is wrapper:
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def _moved(what: str) -> str:
    import transformers

    return (
        f"transformers {transformers.__version__} has no {what}, which sink_patch builds on. It is left as it was. Use "
        "a transformers that is in the table of sink_patch's README, or a newer sink_patch."
    )
