"""Where versions of transformers differ. Installed as `sink_patch.compat`; nothing else of ours asks for a version."""

from __future__ import annotations

from sink_patch.compat.caches import Cached, Entry
from sink_patch.compat.table import choose_shim, installed_shim, why_not_traced

__all__ = ["Cached", "Entry", "choose_shim", "installed_shim", "why_not_traced"]
