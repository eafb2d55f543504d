"""transformers 5.15 and newer: `crop` takes the number of tokens to remove."""

from __future__ import annotations

from dataclasses import replace

from sink_patch.compat import v5_11


def _cache_base() -> type:
    from sink_patch.compat.bases import Newest

    return Newest


SHIM = replace(v5_11.SHIM, cache_base=_cache_base, quirks=())
