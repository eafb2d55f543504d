"""transformers 5.7 to 5.10: recurrent and convolution states are layers of the common cache."""

from __future__ import annotations

from dataclasses import replace

from sink_patch.compat import caches, v5_0, v5_4
from sink_patch.compat.entries import dynamic_layers
from sink_patch.compat.shim import Quirk

STATES = (
    Quirk(
        "bamba falcon_h1 granitemoehybrid lfm2 lfm2_moe mamba2 zamba2",
        whole_prompts="On transformers up to 5.14 states of this model start anew with each forward of several tokens",
    ),
    Quirk("olmo_hybrid", refusal="on transformers up to 5.14 it keeps its states in a cache of its own kind"),
    Quirk("nemotron_h", refusal="on transformers up to 5.14 some entries of its cache stay empty"),
)

SHIM = replace(
    v5_4.SHIM,
    own_layers=dynamic_layers,
    own_cache=caches.takes_any_cache,
    quirks=(v5_0.INDEXER, *STATES),
)
