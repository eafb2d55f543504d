"""The settings of a config for the types of its layers: `layer_types` in the newest version, others before."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from tests.support.versions.caches import caches_have_place_for
from tests.support.versions.fields import ConfigClass, default_of, fields, stored

_FULL, _SLIDING, _LINEAR = "full_attention", "sliding_attention", "linear_attention"
_LISTS = ("layer_types", "layers_block_type")
_MEANING = {
    "mamba": _LINEAR,
    "attention": _FULL,
    "deepseek_sparse_attention": "indexed_attention",
    "qwen_sparse_attention": "indexed_attention",
}


class NotInThisVersion(Exception):
    """The installed transformers cannot make a model of these layers."""


def default_layer_types(config_class: ConfigClass) -> tuple[str, ...]:
    """The types of the default config's layers, each once; empty if it has no such setting.

    Without types for which the default cache has no layer: the default config itself cannot run with those.
    """
    for name in _LISTS:
        if words := default_of(config_class, name):
            return tuple(dict.fromkeys(_MEANING.get(word, word) for word in words if caches_have_place_for(word)))
    return (_SLIDING, _FULL) if _alternates(config_class) else ()


def layer_settings(config_class: ConfigClass, types: Sequence[str]) -> dict[str, Any]:
    """The settings with which the layers have these types.

    Raises:
        NotInThisVersion: this class has no such settings.
    """
    names, words = fields(config_class), _words(config_class)
    if lists := [name for name in _LISTS if name in names or name in stored(config_class)]:
        return {name: [words.get(type_, type_) for type_ in types] for name in lists}
    if "sliding_window_pattern" in names:
        return {"sliding_window_pattern": _period(types)}
    if "use_sliding_window" in names:
        return _all_alike(types)
    if _alternates(config_class) and _period(types) != 2:
        raise NotInThisVersion(f"{config_class.__name__} alternates between both types of layers, so not {list(types)}")
    return {}


def _alternates(config_class: ConfigClass) -> bool:
    """Whether layers alternate between sliding and full attention without a setting for it."""
    names = fields(config_class)
    return names.get("cache_implementation") == "hybrid" and "sliding_window" in names


@functools.cache
def _words(config_class: ConfigClass) -> Mapping[str, str]:
    """The names of layer types in this class, for those that have another name in the newest version."""
    names_in_class = {word for name in _LISTS for word in default_of(config_class, name) or ()}
    if not names_in_class and any(name.startswith("mamba_") for name in fields(config_class)):
        names_in_class = {"mamba"}
    if "mamba" in names_in_class:
        names_in_class |= {"attention"}
    return {meaning: word for word, meaning in _MEANING.items() if word in names_in_class}


def _period(types: Sequence[str]) -> int:
    """The period p if every p-th layer has full attention, and all others have sliding attention."""
    period = types.index(_FULL) + 1 if _FULL in types else len(types) + 1
    if list(types) == [_SLIDING if (index + 1) % period else _FULL for index in range(len(types))]:
        return period
    raise NotInThisVersion(f"the layers of full attention are not at even distances: {list(types)}")


def _all_alike(types: Sequence[str]) -> dict[str, Any]:
    """These models use a sliding window in all layers or in none, whatever the types say."""
    if len(set(types)) > 1:
        raise NotInThisVersion(f"all layers are of one type, not {list(types)}")
    return {"use_sliding_window": types[0] == _SLIDING, "max_window_layers": 0}
