"""Attention-sink KV cache (StreamingLLM, arXiv 2309.17453) for Hugging Face transformers.

    import sink_patch
    model.generate(**inputs, cache_implementation="sink", window_length=1024, num_sink_tokens=4)

Importing this package patches transformers, now or when it is imported; `sink_patch.unpatch()` undoes it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sink_patch.activation import is_patched, patch, unpatch
    from sink_patch.adapters import Adapter, no_positions, rope, sinusoidal_table
    from sink_patch.cache import SinkCache
    from sink_patch.chat import count_sink_tokens
    from sink_patch.errors import (
        AdapterMismatchError,
        CacheFileError,
        CacheStateError,
        FamilyClashError,
        SinkArgumentError,
        SinkPatchError,
        SinkPatchWarning,
        UnboundCacheError,
        UnpicklableCacheError,
        UnsupportedGenerationError,
        UnsupportedModelError,
        UnsupportedTransformersError,
    )
    from sink_patch.family import Family, PositionLimit
    from sink_patch.registry import families, register_family
    from sink_patch.report import Report, inspect
    from sink_patch.rotation import Rotation
    from sink_patch.verdicts import Coverage, Verdict, coverage

__version__ = "0.1.0"

_HOMES = {
    "activation": ("is_patched", "patch", "unpatch"),
    "adapters": ("Adapter", "no_positions", "rope", "sinusoidal_table"),
    "cache": ("SinkCache",),
    "chat": ("count_sink_tokens",),
    "verdicts": ("Coverage", "Verdict", "coverage"),
    "errors": (
        "AdapterMismatchError",
        "CacheFileError",
        "CacheStateError",
        "FamilyClashError",
        "SinkArgumentError",
        "SinkPatchError",
        "SinkPatchWarning",
        "UnboundCacheError",
        "UnpicklableCacheError",
        "UnsupportedGenerationError",
        "UnsupportedModelError",
        "UnsupportedTransformersError",
    ),
    "family": ("Family", "PositionLimit"),
    "registry": ("families", "register_family"),
    "report": ("Report", "inspect"),
    "rotation": ("Rotation",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Adapter",
    "AdapterMismatchError",
    "CacheFileError",
    "CacheStateError",
    "Coverage",
    "Family",
    "FamilyClashError",
    "PositionLimit",
    "Report",
    "Rotation",
    "SinkArgumentError",
    "SinkCache",
    "SinkPatchError",
    "SinkPatchWarning",
    "UnboundCacheError",
    "UnpicklableCacheError",
    "UnsupportedGenerationError",
    "UnsupportedModelError",
    "UnsupportedTransformersError",
    "Verdict",
    "count_sink_tokens",
    "coverage",
    "families",
    "inspect",
    "is_patched",
    "no_positions",
    "patch",
    "register_family",
    "rope",
    "sinusoidal_table",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


importlib.import_module(f"{__name__}.autoload").activate()
