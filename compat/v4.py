"""transformers 4.x, newest first: one whole record for each range of versions that differs for us."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from packaging.specifiers import SpecifierSet

from sink_patch.arguments import CACHE_IMPLEMENTATION
from sink_patch.compat import caches, places
from sink_patch.compat.caches import Entry, entries_of_layers, entries_of_types, layer_types_of
from sink_patch.compat.shim import Constant, Quirk, Shim

_METHODS = (
    *places.CONFIGS,
    places.CUSTOM_GENERATE,
    places.PREPARE_CONFIG,
    places.SAMPLE,
    places.BEAM_SEARCH,
    places.ASSISTED,
    *places.COMPILE,
    *places.INPUTS,
    places.INITIAL_CACHE_POSITION,
)

_PHIMOE = Quirk("phimoe", refusal="on transformers 4.x its tables of angles end where the cache does")
_LLAMA4 = Quirk(
    "llama4 llama4_text", refusal="on transformers 4.54 and 4.55 it mixes the scores of experts among tokens"
)
_GEMMA3N = Quirk(
    "gemma3n gemma3n_text", refusal="on transformers up to 4.55 some of its layers read the cache by themselves"
)
_FALCON_H1 = Quirk("falcon_h1", refusal=caches.OWN)  # which is not said to `generate` in 4.53 alone
_NO_MEDIA = "glm4v_moe"  # its mask is made from three coordinates, and fails
_NO_MEDIA_452 = "qwen2_vl qwen2_5_vl mistral3"  # decoders are not given images in their places; two rotary modules
_FIRST_MEDIA = "idefics2 idefics3"
_CUT_MASKS = Quirk(
    "gemma2 gemma3 gemma3_text cohere2",
    whole_prompts="On transformers 4.52 this model cuts masks of sliding windows right for whole prompts and single "
    "tokens only",
)


class SinkCacheConfig(dict[str, Any]):
    """What 4.52 and 4.53 make of a `cache_config`: still the dict that it was."""

    @classmethod
    def from_dict(cls, config_dict: Any, **_unused: Any) -> SinkCacheConfig:
        return cls(config_dict)

    def to_dict(self) -> dict[str, Any]:
        return dict(self)

    def validate(self) -> None:
        """Nothing: `generate` checks it when it makes the cache, with errors of ours."""


_CONFIG_CLASSES = Constant(
    *("transformers.generation.configuration_utils", "CACHE_CONFIG_MAPPING", CACHE_IMPLEMENTATION),
    value=lambda: SinkCacheConfig,
)

_TRACED_BY = SpecifierSet(">=2.6")


def _cache_of_given_layers() -> type:
    from sink_patch.compat.bases import CacheBase456

    return CacheBase456


def _cache_of_layer_classes() -> type:
    from sink_patch.compat.bases import CacheBase454

    return CacheBase454


def _cache_of_lists() -> type:
    from sink_patch.compat.bases import CacheBase452

    return CacheBase452


def _entries_of_layer_types(config: Any) -> Sequence[Entry]:
    """From `layer_types`; 4.56 is the first whose cache tells by itself."""
    return entries_of_types(config, layer_types_of(config))


def _entries_of_patterns(config: Any) -> Sequence[Entry]:
    """Windows go by a pattern that is written in the models; 4.52 knows no `layer_types`."""
    pattern = getattr(config, "sliding_window_pattern", 2 if config.model_type == "gemma2" else None)
    layers = range(config.num_hidden_layers)
    if pattern is not None:
        sliding = [bool((layer_idx + 1) % pattern) for layer_idx in layers]
    elif getattr(config, "sliding_window", None) is None or not getattr(config, "use_sliding_window", True):
        sliding = [False for _ in layers]
    else:  # one mask for all layers, whatever the config says of some; flash attention alone heeds that
        flash = str(getattr(config, "_attn_implementation", "")).startswith("flash")
        first = getattr(config, "max_window_layers", 0) if flash and hasattr(config, "use_sliding_window") else 0
        sliding = [layer_idx >= first for layer_idx in layers]
    return entries_of_types(config, ["sliding_attention" if one else "full_attention" for one in sliding])


SHIMS = (
    # the decoding mode is an argument where the cache is prepared
    Shim(
        versions=SpecifierSet(">=4.57,<5.0"),
        constants=(places.CHOICES,),
        methods=(*_METHODS, places.prepare_cache("generation_mode"), *places.BATCHING_IN_PACKAGE),
        cache_base=_cache_of_given_layers,
        read_entries=entries_of_layers,
        own_layers=caches.no_layers,
        probe_cache=caches.dynamic_cache,
        cached=caches.cached_layers,
        generation_mode=places.given_mode,
        own_cache=caches.keeps_its_own_cache,
        passes_cache_position=True,
        explicit_masks=False,
        traced_by=_TRACED_BY,
        quirks=(_PHIMOE,),
        no_media=_NO_MEDIA,
    ),
    # a cache is given its layers, and knows from the config what they hold
    Shim(
        versions=SpecifierSet(">=4.56,<4.57"),
        constants=(places.CHOICES,),
        methods=(*_METHODS, places.prepare_cache("assistant_model"), *places.BATCHING_IN_PACKAGE),
        cache_base=_cache_of_given_layers,
        read_entries=entries_of_layers,
        own_layers=caches.no_layers,
        probe_cache=caches.dynamic_cache,
        cached=caches.cached_layers,
        generation_mode=places.mode_of_config,
        own_cache=caches.keeps_its_own_cache,
        passes_cache_position=True,
        explicit_masks=False,
        traced_by=_TRACED_BY,
        quirks=(_PHIMOE,),
        no_media=_NO_MEDIA,
    ),
    # caches are made of layers; `cache_config` is a dict again
    Shim(
        versions=SpecifierSet(">=4.54,<4.56"),
        constants=(places.CHOICES,),
        methods=(*_METHODS, places.prepare_cache("assistant_model"), *places.BATCHING_IN_FILE),
        cache_base=_cache_of_layer_classes,
        read_entries=_entries_of_layer_types,
        own_layers=caches.no_layers,
        probe_cache=caches.growing_cache,
        cached=caches.cached_layers,
        generation_mode=places.mode_of_config,
        own_cache=caches.keeps_its_own_cache,
        passes_cache_position=True,
        explicit_masks=False,
        traced_by=_TRACED_BY,
        quirks=(_PHIMOE, _GEMMA3N, _LLAMA4),
        no_media=_NO_MEDIA,
    ),
    # `masking_utils` asks the cache for the sizes of masks; configs have `layer_types`
    Shim(
        versions=SpecifierSet(">=4.53,<4.54"),
        constants=(places.CHOICES, _CONFIG_CLASSES),
        methods=(*_METHODS, places.prepare_cache("assistant_model"), *places.BATCHING_IN_FILE),
        cache_base=_cache_of_lists,
        read_entries=_entries_of_layer_types,
        own_layers=caches.no_layers,
        probe_cache=caches.growing_cache,
        cached=caches.cached_lists,
        generation_mode=places.mode_of_config,
        own_cache=caches.keeps_its_own_cache,
        passes_cache_position=True,
        explicit_masks=False,
        traced_by=_TRACED_BY,
        quirks=(_PHIMOE, _GEMMA3N, _FALCON_H1),
        first_media=_FIRST_MEDIA,
    ),
    # models build their masks themselves, caches hold lists, `cache_config` becomes a class
    Shim(
        versions=SpecifierSet(">=4.52,<4.53"),
        constants=(places.CHOICES, _CONFIG_CLASSES),
        methods=(*_METHODS, places.prepare_cache("assistant_model")),
        cache_base=_cache_of_lists,
        read_entries=_entries_of_patterns,
        own_layers=caches.no_layers,
        probe_cache=caches.growing_cache,
        cached=caches.cached_lists,
        generation_mode=places.mode_of_config,
        own_cache=caches.keeps_its_own_cache,
        passes_cache_position=True,
        explicit_masks=True,
        traced_by=_TRACED_BY,
        quirks=(_PHIMOE, _CUT_MASKS),
        no_media=_NO_MEDIA_452,
        first_media=_FIRST_MEDIA,
    ),
)
