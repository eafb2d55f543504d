"""What the default caches of models with states beside keys can do without."""

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
