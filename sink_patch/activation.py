"""Patching transformers, and undoing it.

What is wrapped stays wrapped: undoing is a flag that every wrapper asks (`enabled`), since taking a wrapper off could
take another library's along. The public verbs hold the guards; the private ones do the work.
"""

from __future__ import annotations

import inspect
import sys
import threading
import warnings
from types import ModuleType
from typing import Any

import wrapt

from sink_patch.autoload import is_armed
from sink_patch.compat import choose_shim
from sink_patch.compat.shim import Constant, Method, Shim
from sink_patch.errors import SinkPatchWarning, UnsupportedTransformersError

_lock = threading.RLock()
_enabled = is_armed()
_added: list[Constant] = []


def patch() -> None:
    """Teach transformers `cache_implementation="sink"`. Twice is as good as once.

    Raises:
        UnsupportedTransformersError: this transformers cannot be patched; it is left as it was.
    """
    global _enabled
    with _lock:
        try:
            _install_all()
        except UnsupportedTransformersError:
            unpatch()
            raise
        _enabled = True


def unpatch() -> None:
    """Make transformers behave as if sink_patch were not there. Caches that exist go on working."""
    global _enabled
    with _lock:
        _enabled = False
        while _added:
            _remove(_added.pop())


def is_patched() -> bool:
    """Whether `cache_implementation="sink"` is understood (or will be, as soon as transformers is imported)."""
    return _enabled


def when_imported(module: ModuleType) -> None:
    """Post-import hook: patch a module of transformers that has just been imported.

    A failure is a warning here: it must not break the import.
    """
    if not is_patched():  # unpatch() was faster
        return
    try:
        patch()
    except Exception as failure:
        unpatch()
        warnings.warn(f"{module.__name__} is not patched: {failure}", SinkPatchWarning, stacklevel=2)


def _install_all() -> None:
    import transformers

    shim = choose_shim(transformers.__version__)
    for module in shim.modules:
        if module in sys.modules:
            _install(shim, module)


def _install(shim: Shim, module: str) -> None:
    """Patch what a module holds so far; it may be in the middle of its import (torch is first imported from there)."""
    for constant in shim.constants:
        if constant.module == module:
            _add(constant)
    for method in shim.methods:
        if method.module == module and hasattr(sys.modules[module], method.owner):
            _wrap(method)


def _add(constant: Constant) -> None:
    module = sys.modules[constant.module]
    if hasattr(module, constant.name):
        names: tuple[str, ...] = getattr(module, constant.name)
        if constant.entry not in names:
            setattr(module, constant.name, (*names, constant.entry))
            _added.append(constant)
    elif not _is_being_imported(module):
        raise UnsupportedTransformersError(_moved(f"{constant.module}.{constant.name}"))


def _remove(constant: Constant) -> None:
    module = sys.modules.get(constant.module)
    if module is not None and hasattr(module, constant.name):
        names: tuple[str, ...] = getattr(module, constant.name)
        setattr(module, constant.name, tuple(name for name in names if name != constant.entry))


def _wrap(method: Method) -> None:
    from sink_patch import generate

    owner = getattr(sys.modules[method.module], method.owner)
    original = vars(owner).get(method.name)
    if original is None or not set(method.parameters) <= set(inspect.signature(original).parameters):
        raise UnsupportedTransformersError(_moved(f"{method.owner}.{method.name}({', '.join(method.parameters)})"))
    wrapper = getattr(generate, method.role)
    if not _is_wrapped(original, wrapper):
        wrapt.wrap_object(owner, method.name, wrapt.FunctionWrapper, (wrapper, is_patched))


def _is_wrapped(function: Any, wrapper: Any) -> bool:
    """Whether our wrapper is anywhere in the chain: another library may have wrapped it again."""
    while function is not None:
        if getattr(function, "_self_wrapper", None) is wrapper:
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def _is_being_imported(module: ModuleType) -> bool:
    return bool(getattr(module.__spec__, "_initializing", False))


def _moved(what: str) -> str:
    import transformers

    return (
        f"transformers {transformers.__version__} has no {what}, which sink_patch builds on. It is left as it was. Use "
        "a transformers that is in the table of sink_patch's README, or a newer sink_patch."
    )
