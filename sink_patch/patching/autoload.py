"""Switching on: at `import sink_patch`, and with no import at all through torch's entry point.

torch loads the entry points of the group "torch.backends" at the end of `import torch`, and an exception there would
break it. So this module imports only the standard library at the top, and catches and reports everything, once.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

SWITCH = "SINK_PATCH_AUTOLOAD"
_MODULES = (
    "transformers.generation.configuration_utils",
    # from 5.8 on, torch is first imported from inside generation.utils, where GenerationMixin does not exist yet
    "transformers.generation.utils",
    "transformers.modeling_utils",
)
_armed = False
_broken = False


def is_armed() -> bool:
    """Whether transformers is, or will be, patched as it is imported."""
    return _armed


def activate() -> None:
    """Patch transformers now or, where it is not imported yet, when it is. Set SINK_PATCH_AUTOLOAD=0 for nothing."""
    if os.environ.get(SWITCH, "1") == "0" or _broken:
        return
    try:
        arm()
    except Exception as failure:
        _complain(failure)


def arm() -> None:
    """Wait for the modules of transformers; those that are imported already are told of at once."""
    global _armed
    if _armed:
        return
    from wrapt import register_post_import_hook

    _armed = True
    for module in _MODULES:
        register_post_import_hook(_when_imported, module)


def _when_imported(module: ModuleType) -> None:
    """Patch a module of transformers that has just been imported; whatever fails must not break the import."""
    if _broken:
        return
    try:
        importlib.import_module("sink_patch.patching.switch").when_imported(module)
    except Exception as failure:
        _complain(failure)


def _complain(failure: Exception) -> None:
    global _broken
    _broken = True
    importlib.import_module("sink_patch.errors").tell(
        f"sink_patch could not switch itself on ({type(failure).__name__}: {failure}); transformers works without it, "
        'and cache_implementation="sink" is unknown.'
    )
