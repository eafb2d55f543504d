"""Patching transformers, and undoing it.

What is wrapped stays wrapped: undoing is a flag that every wrapper asks (`enabled`), since taking a wrapper off could
take another library's along. The public verbs hold the guards; the private ones do the work. All that is to be touched
is looked at first, so that a transformers of another shape is left as it was.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from sink_patch.compat import installed_shim
from sink_patch.compat.shim import Constant, Method, Role, Shim
from sink_patch.errors import UnsupportedTransformersError, tell
from sink_patch.patching.autoload import wait_for_transformers
from sink_patch.patching.refuse_all import refuse_all, stop_refusing
from sink_patch.patching.state import state
from sink_patch.patching.wrapping import wrap_once

_lock = threading.RLock()
_ours: set[Constant] = set()  # entries that we have put into transformers, at any time


def patch() -> None:
    """Teach transformers `cache_implementation="sink"`. Twice is as good as once.

    Raises:
        UnsupportedTransformersError: this transformers cannot be patched; it is left as it was.
    """
    with _lock:
        if state.is_patching:  # our own imports have brought a module of transformers, before they are done
            state.is_due = True
            return
        try:
            _change_all()
            state.is_enabled = True
            stop_refusing()
            wait_for_transformers()
        except BaseException as failure:
            unpatch()
            if isinstance(failure, UnsupportedTransformersError):
                refuse_all(str(failure))
            raise


def unpatch() -> None:
    """Make transformers behave as if sink_patch were not there. Caches that exist go on working."""
    with _lock:
        state.is_enabled = False
        stop_refusing()
        for constant in _ours:
            _remove(constant)


def is_patched() -> bool:
    """Whether `cache_implementation="sink"` is understood, or will be as soon as transformers is imported."""
    return state.is_enabled


def when_imported(module: ModuleType) -> None:
    """Patch a module of transformers that has just been imported, unless `unpatch` was faster.

    A failure is a warning here: it must not break the import. A request for the sink cache is an error from then on.
    """
    if state.refusal is not None:
        refuse_all(state.refusal)  # perhaps in the module that has just come
    if not is_patched():
        return
    try:
        patch()
    except UnsupportedTransformersError as failure:
        tell(f"{module.__name__} is not patched: {failure}")
        refuse_all(str(failure))
    except Exception as failure:
        tell(f"{module.__name__} is not patched: {failure}")


def _change_all() -> None:
    """Patch what is imported so far, and what that itself imports."""
    state.is_patching = True
    try:
        state.is_due = True
        while state.is_due:
            state.is_due = False
            for change in list(_changes(installed_shim())):  # all are found before the first is made
                change()
    finally:
        state.is_patching = False


def _changes(shim: Shim) -> Iterator[Callable[[], None]]:
    """What is to be done to the modules that are imported so far.

    One may be in the middle of its import (torch is first imported from there): then what it lacks will come.

    Raises:
        UnsupportedTransformersError: something is not where it should be.
    """
    for constant in shim.constants:
        module = sys.modules.get(constant.module)
        if module is not None and _has(module, constant.name):
            yield functools.partial(_add, constant)
    for method in shim.methods:
        module = sys.modules.get(method.module)
        if module is None or (method.optional and method.name not in vars(getattr(module, method.owner, object))):
            continue
        if _has(module, method.owner):
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
    original = vars(owner).get(method.name)
    if original is None or not set(method.parameters) <= set(inspect.signature(original).parameters):
        raise UnsupportedTransformersError(_moved(f"{method.owner}.{method.name}({', '.join(method.parameters)})"))
    return functools.partial(wrap_once, owner, method.name, _wrapper(method.role), is_patched)


def _wrapper(role: Role) -> Callable[..., Any]:
    """Whatever needs torch is imported when a module that needs it as well has been."""
    from sink_patch.doors import configs

    if role in configs.WRAPPERS:
        return configs.WRAPPERS[role]
    from sink_patch.doors import continuous_batching, custom_generate
    from sink_patch.generation import wrappers

    return {**wrappers.WRAPPERS, **continuous_batching.WRAPPERS, **custom_generate.WRAPPERS}[role]


def _moved(what: str) -> str:
    import transformers

    return (
        f"transformers {transformers.__version__} has no {what}, which sink_patch builds on. It is left as it was. Use "
        "a transformers that is in the table of compat/README.md of sink_patch, or a newer sink_patch."
    )
