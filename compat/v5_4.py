"""transformers 5.4: `cache_position` is gone; masks go by the number of new tokens."""

from __future__ import annotations

from dataclasses import replace

from sink_patch.compat import places, v4_56, v5_0


def _cache_base() -> type:
    from sink_patch.compat.bases import ByLength

    return ByLength


SHIM = replace(
    v5_0.SHIM,
    methods=(*v4_56.METHODS, places.prepare_cache("generation_mode")),
    cache_base=_cache_base,
    passes_cache_position=False,
    quirks=(v5_0.INDEXER,),
)
