"""What the default caches of models with states beside keys can hold, and what they cannot do without."""

from __future__ import annotations

from transformers import cache_utils

try:
    from transformers import masking_utils
except ImportError:  # masks were made in each model
    masking_utils = None


def families_have_caches() -> bool:
    """Such families have a class of cache each, which looks for a layer with states."""
    return not hasattr(cache_utils, "LinearAttentionLayer")


def caches_need_states() -> bool:
    """Models ask the cache that all families share whether there are states, and it refuses where no layer has any."""
    return not families_have_caches() and not hasattr(masking_utils, "create_recurrent_attention_mask")


def caches_have_place_for(layer_type: str) -> bool:
    """Layers without attention were given a place in the cache one after the other: experts first, then plain MLPs."""
    places = getattr(cache_utils, "DYNAMIC_LAYER_TYPE_MAPPING", {})
    return layer_type != "mlp" or "mlp" in places or "moe" not in places
