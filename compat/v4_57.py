"""transformers 4.57: the decoding mode is an argument where the cache is prepared."""

from __future__ import annotations

from dataclasses import replace

from sink_patch.compat import modes, places, v4_56

SHIM = replace(
    v4_56.SHIM,
    methods=(*v4_56.METHODS, places.prepare_cache("generation_mode"), places.INITIAL_CACHE_POSITION),
    generation_mode=modes.given_mode,
)
