"""transformers 4.53: `masking_utils` asks the cache for the sizes of masks; configs have `layer_types`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sink_patch.compat import caches, places, v4_52
from sink_patch.compat.entries import Entry, entries_of_types, layer_types_of
from sink_patch.compat.shim import Quirk


def read_entries(config: Any) -> Sequence[Entry]:
    """From `layer_types`; 4.56 is the first whose cache tells by itself."""
    return entries_of_types(config, layer_types_of(config))


FALCON_H1 = Quirk("falcon_h1", refusal=caches.OWN)  # which is not said to `generate` in 4.53 alone

SHIM = replace(
    v4_52.SHIM,
    methods=(*v4_52.SHIM.methods, places.IN_FILE),
    read_entries=read_entries,
    explicit_masks=False,
    quirks=(v4_52.PHIMOE, v4_52.GEMMA3N, FALCON_H1),
)
