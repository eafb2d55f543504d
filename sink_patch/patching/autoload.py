"""Switching on: at `import sink_patch`, and with no import at all through torch's entry point.

torch loads the entry points of the group "torch.backends" at the end of `import torch`, and an exception there would
break it. So this module imports only the standard library at the top, and catches and reports everything, once.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

from sink_patch.patching.state import state

SWITCH = "SINK_PATCH_AUTOLOAD"
_MODULES = (
    "transformers.generation.configuration_utils",
    # torch may be imported from inside generation.utils first, where GenerationMixin does not exist yet
    "transformers.generation.utils",
    "transformers.modeling_utils",
    "transformers.cli.serving.utils",
    *(f"transformers.models.{name}.modeling_{name}" for name in ("phi3", "phimoe", "phi4_multimodal")),
)
"""Those in which something is wrapped (compat/places.py), but for those that `GenerationMixin` imports itself."""


def activate() -> None:
    """Patch transformers now or, where it is not imported yet, when it is. Set SINK_PATCH_AUTOLOAD=0 for nothing."""
    if os.environ.get(SWITCH, "1") == "0" or state.has_failed or state.is_waiting:
        return
    try:
        state.is_enabled = True
        wait_for_transformers()
    except Exception as failure:
        _give_up(failure)


def wait_for_transformers() -> None:
    """Patch the modules of transformers as they are imported; those that are imported already at once."""
    if state.is_waiting:
        return
    from wrapt import register_post_import_hook

    state.is_waiting = True
    for module in _MODULES:
        register_post_import_hook(_when_imported, module)


def _when_imported(module: ModuleType) -> None:
    """Patch a module of transformers that has just been imported; whatever fails must not break the import."""
    if state.has_failed:
        return
    try:
        importlib.import_module("sink_patch.patching.switch").when_imported(module)
    except Exception as failure:
        _give_up(failure)


def _give_up(failure: Exception) -> None:
    state.is_enabled, state.has_failed = False, True
    importlib.import_module("sink_patch.errors").tell(
        f"sink_patch could not switch itself on ({type(failure).__name__}: {failure}); transformers works without it, "
        'and cache_implementation="sink" is unknown.'
    )
