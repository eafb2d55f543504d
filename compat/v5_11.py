"""transformers 5.11 to 5.14: learned indices keep their keys in the cache."""

from __future__ import annotations

from dataclasses import replace

from sink_patch.compat import v5_7

SHIM = replace(v5_7.SHIM, quirks=v5_7.STATES)
