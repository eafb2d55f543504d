"""transformers 4.54 and 4.55: caches are made of layers; `cache_config` is a dict again."""

from __future__ import annotations

from dataclasses import replace

from sink_patch.compat import caches, places, v4_52, v4_53
from sink_patch.compat.shim import Quirk


def _cache_base() -> type:
    from sink_patch.compat.bases import ByPositionClassed

    return ByPositionClassed


LLAMA4 = Quirk(
    "llama4 llama4_text", refusal="on transformers 4.54 and 4.55 it mixes the scores of experts among tokens"
)

SHIM = replace(
    v4_53.SHIM,
    constants=(places.CHOICES,),
    cache_base=_cache_base,
    cached=caches.cached_layers,
    quirks=(v4_52.PHIMOE, v4_52.GEMMA3N, LLAMA4),
)
