"""Attention-sink KV cache (StreamingLLM, arXiv 2309.17453) for Hugging Face transformers.

    import sink_patch
    model.generate(**inputs, cache_implementation="sink", window_length=1024, num_sink_tokens=4)

Importing this package patches transformers, now or when it is imported; `sink_patch.unpatch()` undoes it.
"""

from __future__ import annotations

import ast
import functools
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the public names, each with its home: imported when it is first asked for (`__getattr__`)
    from sink_patch.buffers.rotation import Rotation as Rotation
    from sink_patch.cache.sink_cache import SinkCache as SinkCache
    from sink_patch.doors.directories.configure import configure as configure
    from sink_patch.doors.directories.configure import unconfigure as unconfigure
    from sink_patch.errors import AdapterMismatchError as AdapterMismatchError
    from sink_patch.errors import CacheFileError as CacheFileError
    from sink_patch.errors import CacheStateError as CacheStateError
    from sink_patch.errors import FamilyClashError as FamilyClashError
    from sink_patch.errors import HistoryMismatchError as HistoryMismatchError
    from sink_patch.errors import SinkArgumentError as SinkArgumentError
    from sink_patch.errors import SinkPatchError as SinkPatchError
    from sink_patch.errors import SinkPatchWarning as SinkPatchWarning
    from sink_patch.errors import UnboundCacheError as UnboundCacheError
    from sink_patch.errors import UnpicklableCacheError as UnpicklableCacheError
    from sink_patch.errors import UnsupportedGenerationError as UnsupportedGenerationError
    from sink_patch.errors import UnsupportedModelError as UnsupportedModelError
    from sink_patch.errors import UnsupportedTransformersError as UnsupportedTransformersError
    from sink_patch.generation.chat import count_sink_tokens as count_sink_tokens
    from sink_patch.generation.endless.stream import stream as stream
    from sink_patch.generation.templates.settings import chat_settings as chat_settings
    from sink_patch.history.windows import Window as Window
    from sink_patch.kept.public import kept_streams as kept_streams
    from sink_patch.models.adapters.adapter import Adapter as Adapter
    from sink_patch.models.adapters.rope import no_positions as no_positions
    from sink_patch.models.adapters.rope import rope as rope
    from sink_patch.models.adapters.rope import sinusoidal_table as sinusoidal_table
    from sink_patch.models.families.coverage import Coverage as Coverage
    from sink_patch.models.families.coverage import Verdict as Verdict
    from sink_patch.models.families.coverage import coverage as coverage
    from sink_patch.models.families.family import Family as Family
    from sink_patch.models.families.family import PositionLimit as PositionLimit
    from sink_patch.models.families.registry import families as families
    from sink_patch.models.families.registry import register_family as register_family
    from sink_patch.models.report import Report as Report
    from sink_patch.models.report import inspect as inspect
    from sink_patch.patching.switch import is_patched as is_patched
    from sink_patch.patching.switch import patch as patch
    from sink_patch.patching.switch import unpatch as unpatch

__version__ = "0.1.0"


@functools.cache
def _homes() -> dict[str, str]:
    """The module of each public name, read off the imports above: they are written once, and type checkers see them."""
    tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 0]
    ours = [node for node in found if node.module is not None and node.module.startswith(f"{__name__}.")]
    return {alias.name: str(node.module) for node in ours for alias in node.names}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted(_homes())
    if name.startswith("_") or name not in _homes():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_homes()[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_homes()})


importlib.import_module(f"{__name__}.patching.autoload").activate()
