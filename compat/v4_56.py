"""transformers 4.56: a cache is given its layers, and knows from the config what they hold."""

from __future__ import annotations

from dataclasses import replace

from sink_patch.compat import caches, places, v4_52, v4_54
from sink_patch.compat.entries import entries_of_layers


def _cache_base() -> type:
    from sink_patch.compat.bases import ByPosition

    return ByPosition


METHODS = (
    places.PREPARE_CONFIG,
    places.SAMPLE,
    places.BEAM_SEARCH,
    places.ASSISTED,
    *places.COMPILE,
    places.IN_PACKAGE,
)

SHIM = replace(
    v4_54.SHIM,
    methods=(*METHODS, places.prepare_cache("assistant_model"), places.INITIAL_CACHE_POSITION),
    cache_base=_cache_base,
    read_entries=entries_of_layers,
    probe_cache=caches.dynamic_cache,
    quirks=(v4_52.PHIMOE,),
)
