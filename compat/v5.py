"""transformers 5.x, newest first: one whole record for each range of versions that differs for us."""

from __future__ import annotations

from packaging.specifiers import SpecifierSet

from sink_patch.compat import caches, places
from sink_patch.compat.caches import dynamic_layers, entries_of_layers
from sink_patch.compat.shim import Quirk, Shim

_METHODS = (
    *places.CONFIGS,
    places.CUSTOM_GENERATE,
    places.PREPARE_CONFIG,
    places.prepare_cache("generation_mode"),
    places.SAMPLE,
    places.BEAM_SEARCH,
    places.ASSISTED,
    *places.COMPILE,
    *places.BATCHING_IN_PACKAGE,
    places.SERVE,
    *places.INPUTS,
)

_STATES = (
    Quirk(
        "bamba falcon_h1 granitemoehybrid lfm2 lfm2_moe mamba2 zamba2",
        whole_prompts="On transformers up to 5.14 states of this model start anew with each forward of several tokens",
    ),
    Quirk("olmo_hybrid", refusal="on transformers up to 5.14 it keeps its states in a cache of its own kind"),
    Quirk("nemotron_h", refusal="on transformers up to 5.14 some entries of its cache stay empty"),
)
_DELTA_RULE = Quirk(
    "qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next",
    whole_prompts="On transformers up to 5.6 states of this model start anew with each forward of several tokens",
)
_INDEXER = Quirk(
    "glm_moe_dsa", refusal="on transformers up to 5.10 its learned index keeps keys on the model, not in the cache"
)
_ONE_COLUMN_TOO_MANY = Quirk("persimmon stablelm", explicit_mask=True)  # 5.0 guesses one column more than there is

_TRACED_BY = SpecifierSet(">=2.7")  # before, it fails at the names of a function's arguments


def _cache_that_crops_by_count() -> type:
    from sink_patch.compat.bases import CacheBase515

    return CacheBase515


def _cache_with_masks_by_length() -> type:
    from sink_patch.compat.bases import CacheBase504

    return CacheBase504


def _cache_with_masks_by_position() -> type:
    from sink_patch.compat.bases import CacheBase456

    return CacheBase456


SHIMS = (
    # continuous batching has an allocator for each kind of layers
    Shim(
        versions=SpecifierSet(">=5.18,<5.25"),
        constants=(places.CHOICES,),
        methods=_METHODS,
        cache_base=_cache_that_crops_by_count,
        read_entries=entries_of_layers,
        own_layers=dynamic_layers,
        probe_cache=caches.dynamic_cache,
        cached=caches.cached_layers,
        generation_mode=places.given_mode,
        own_cache=caches.takes_any_cache,
        passes_cache_position=False,
        explicit_masks=False,
        traced_by=_TRACED_BY,
        quirks=(),
        batching=places.BATCHING,
    ),
    # `crop` takes the number of tokens to remove
    Shim(
        versions=SpecifierSet(">=5.15,<5.18"),
        constants=(places.CHOICES,),
        methods=_METHODS,
        cache_base=_cache_that_crops_by_count,
        read_entries=entries_of_layers,
        own_layers=dynamic_layers,
        probe_cache=caches.dynamic_cache,
        cached=caches.cached_layers,
        generation_mode=places.given_mode,
        own_cache=caches.takes_any_cache,
        passes_cache_position=False,
        explicit_masks=False,
        traced_by=_TRACED_BY,
        quirks=(),
    ),
    # learned indices keep their keys in the cache
    Shim(
        versions=SpecifierSet(">=5.11,<5.15"),
        constants=(places.CHOICES,),
        methods=_METHODS,
        cache_base=_cache_with_masks_by_length,
        read_entries=entries_of_layers,
        own_layers=dynamic_layers,
        probe_cache=caches.dynamic_cache,
        cached=caches.cached_layers,
        generation_mode=places.given_mode,
        own_cache=caches.takes_any_cache,
        passes_cache_position=False,
        explicit_masks=False,
        traced_by=_TRACED_BY,
        quirks=_STATES,
    ),
    # recurrent and convolution states are layers of the common cache
    Shim(
        versions=SpecifierSet(">=5.7,<5.11"),
        constants=(places.CHOICES,),
        methods=_METHODS,
        cache_base=_cache_with_masks_by_length,
        read_entries=entries_of_layers,
        own_layers=dynamic_layers,
        probe_cache=caches.dynamic_cache,
        cached=caches.cached_layers,
        generation_mode=places.given_mode,
        own_cache=caches.takes_any_cache,
        passes_cache_position=False,
        explicit_masks=False,
        traced_by=_TRACED_BY,
        quirks=(_INDEXER, *_STATES),
    ),
    # as above, and delta-rule states start anew with each forward of several tokens
    Shim(
        versions=SpecifierSet(">=5.5,<5.7"),
        constants=(places.CHOICES,),
        methods=_METHODS,
        cache_base=_cache_with_masks_by_length,
        read_entries=entries_of_layers,
        own_layers=dynamic_layers,
        probe_cache=caches.dynamic_cache,
        cached=caches.cached_layers,
        generation_mode=places.given_mode,
        own_cache=caches.takes_any_cache,
        passes_cache_position=False,
        explicit_masks=False,
        traced_by=_TRACED_BY,
        quirks=(_INDEXER, *_STATES, _DELTA_RULE),
    ),
    # `cache_position` is gone; masks go by the number of new tokens
    Shim(
        versions=SpecifierSet(">=5.4,<5.5"),
        constants=(places.CHOICES,),
        methods=_METHODS,
        cache_base=_cache_with_masks_by_length,
        read_entries=entries_of_layers,
        own_layers=caches.no_layers,
        probe_cache=caches.dynamic_cache,
        cached=caches.cached_layers,
        generation_mode=places.given_mode,
        own_cache=caches.keeps_its_own_cache,
        passes_cache_position=False,
        explicit_masks=False,
        traced_by=_TRACED_BY,
        quirks=(_INDEXER,),
    ),
    # all rotary modules keep their frequencies in buffers
    Shim(
        versions=SpecifierSet(">=5.0,<5.4"),
        constants=(places.CHOICES,),
        methods=(*_METHODS, places.INITIAL_CACHE_POSITION),
        cache_base=_cache_with_masks_by_position,
        read_entries=entries_of_layers,
        own_layers=caches.no_layers,
        probe_cache=caches.dynamic_cache,
        cached=caches.cached_layers,
        generation_mode=places.given_mode,
        own_cache=caches.keeps_its_own_cache,
        passes_cache_position=True,
        explicit_masks=False,
        traced_by=_TRACED_BY,
        quirks=(_INDEXER, _ONE_COLUMN_TOO_MANY),
    ),
)
