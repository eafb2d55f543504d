"""transformers 5.0 to 5.3: all rotary modules keep their frequencies in buffers."""

from __future__ import annotations

from dataclasses import replace

from sink_patch.compat import v4_57

SHIM = replace(v4_57.SHIM, quirks=())
