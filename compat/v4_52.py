"""transformers 4.52: models build their masks themselves, caches hold lists, `cache_config` becomes a class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sink_patch.compat import caches, modes, places
from sink_patch.compat.entries import Entry, entries_of_types
from sink_patch.compat.shim import Constant, Quirk, Shim

_SLICED = "On transformers 4.52 this model cuts masks of sliding windows right for whole prompts and single tokens only"


GEMMA3N = Quirk(
    "gemma3n gemma3n_text", refusal="on transformers up to 4.55 some of its layers read the cache by themselves"
)
PHIMOE = Quirk("phimoe", refusal="on transformers 4.x its tables of angles end where the cache does")


class SinkCacheConfig(dict[str, Any]):
    """What 4.52 and 4.53 make of a `cache_config`: still the dict that it was."""

    @classmethod
    def from_dict(cls, config_dict: Any, **_unused: Any) -> SinkCacheConfig:
        return cls(config_dict)

    def to_dict(self) -> dict[str, Any]:
        return dict(self)

    def validate(self) -> None:
        """Nothing: `generate` checks it when it makes the cache, with errors of ours."""


CONFIG_CLASSES = Constant(
    *("transformers.generation.configuration_utils", "CACHE_CONFIG_MAPPING", "sink"), value=lambda: SinkCacheConfig
)


def _cache_base() -> type:
    from sink_patch.compat.bases import ByPositionPlain

    return ByPositionPlain


def _read_entries(config: Any) -> Sequence[Entry]:
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


SHIM = Shim(
    constants=(places.CHOICES, CONFIG_CLASSES),
    methods=(
        places.PREPARE_CONFIG,
        places.prepare_cache("assistant_model"),
        places.SAMPLE,
        places.BEAM_SEARCH,
        places.ASSISTED,
        *places.COMPILE,
        places.INITIAL_CACHE_POSITION,
    ),
    cache_base=_cache_base,
    read_entries=_read_entries,
    own_layers=caches.no_layers,
    probe_cache=caches.growing_cache,
    cached=caches.cached_lists,
    generation_mode=modes.mode_of_config,
    own_cache=caches.keeps_its_own_cache,
    passes_cache_position=True,
    explicit_masks=True,
    quirks=(PHIMOE, Quirk("gemma2 gemma3 gemma3_text cohere2", whole_prompts=_SLICED)),
)
