"""transformers 5.12 to 5.15: learned indices keep their keys in the cache."""

from __future__ import annotations

from dataclasses import replace

from sink_patch.compat import v5_8

SHIM = replace(v5_8.SHIM, quirks=v5_8.STATES)
