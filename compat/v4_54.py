"""transformers 4.54 and 4.55: caches are made of layers; `cache_config` is a dict again."""

from __future__ import annotations

from dataclasses import replace

from sink_patch.compat import caches, places, v4_52, v4_53


def _cache_base() -> type:
    from sink_patch.compat.bases import ByPositionClassed

    return ByPositionClassed


SHIM = replace(
    v4_53.SHIM,
    constants=(places.CHOICES,),
    cache_base=_cache_base,
    cached=caches.cached_layers,
    quirks=(v4_52.PHIMOE, v4_52.GEMMA3N),
)
