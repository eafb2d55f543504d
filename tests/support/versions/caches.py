"""What the default caches of models with recurrent states can hold, and what they need."""

from __future__ import annotations

from transformers import cache_utils

try:
    from transformers import masking_utils
except ImportError:  # masks were made in each model
    masking_utils = None


def families_have_caches() -> bool:
    """Whether each family with states has a cache class of its own, which needs a layer with states."""
    return not hasattr(cache_utils, "LinearAttentionLayer")


def caches_need_states() -> bool:
    """Whether models ask the shared cache class for states, which raises if no layer has any."""
    return not families_have_caches() and not hasattr(masking_utils, "create_recurrent_attention_mask")


def caches_have_place_for(layer_type: str) -> bool:
    """Whether the cache has a layer class for this type: that for experts is older than that for plain MLPs."""
    places = getattr(cache_utils, "DYNAMIC_LAYER_TYPE_MAPPING", {})
    return layer_type != "mlp" or "mlp" in places or "moe" not in places
