"""transformers 5.8 to 5.11: recurrent and convolution states are layers of the common cache."""

from __future__ import annotations

from dataclasses import replace

from sink_patch.compat import caches, v5_4
from sink_patch.compat.entries import dynamic_layers

SHIM = replace(v5_4.SHIM, own_layers=dynamic_layers, own_cache=caches.takes_any_cache)
