"""How a config says of which type each layer is: `layer_types` in the newest words, or what there was before."""

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


def hear_layers(config_class: ConfigClass) -> tuple[str, ...]:
    """The types of the default config's layers, each once; empty where it does not say.

    Types for which the default cache has no layer, so that the default config itself cannot run, are left out.
    """
    for name in _LISTS:
        if words := default_of(config_class, name):
            return tuple(dict.fromkeys(_MEANING.get(word, word) for word in words if caches_have_place_for(word)))
    return (_SLIDING, _FULL) if _takes_turns(config_class) else ()


def say_layers(config_class: ConfigClass, types: Sequence[str]) -> dict[str, Any]:
    """Settings by which the layers are of these types.

    Raises:
        NotInThisVersion: a config of this class cannot say so.
    """
    names, words = fields(config_class), _words(config_class)
    if lists := [name for name in _LISTS if name in names or name in stored(config_class)]:
        return {name: [words.get(type_, type_) for type_ in types] for name in lists}
    if "sliding_window_pattern" in names:
        return {"sliding_window_pattern": _period(types)}
    if "use_sliding_window" in names:
        return _all_alike(types)
    if _takes_turns(config_class) and _period(types) != 2:
        raise NotInThisVersion(f"{config_class.__name__} has layers of both types in turns, not {list(types)}")
    return {}


def _takes_turns(config_class: ConfigClass) -> bool:
    """Sliding and full attention in turns, of which no list tells."""
    names = fields(config_class)
    return names.get("cache_implementation") == "hybrid" and "sliding_window" in names


@functools.cache
def _words(config_class: ConfigClass) -> Mapping[str, str]:
    """How the class calls types of layers, where that is not their newest name."""
    said = {word for name in _LISTS for word in default_of(config_class, name) or ()}
    if not said and any(name.startswith("mamba_") for name in fields(config_class)):
        said = {"mamba"}
    if "mamba" in said:
        said |= {"attention"}
    return {meaning: word for word, meaning in _MEANING.items() if word in said}


def _period(types: Sequence[str]) -> int:
    """Every so manieth layer is one of full attention, all others slide."""
    period = types.index(_FULL) + 1 if _FULL in types else len(types) + 1
    if list(types) == [_SLIDING if (index + 1) % period else _FULL for index in range(len(types))]:
        return period
    raise NotInThisVersion(f"the layers of full attention do not stand at even distances: {list(types)}")


def _all_alike(types: Sequence[str]) -> dict[str, Any]:
    """Such models hide what lies outside the window from each of their layers, whichever are said to slide."""
    if len(set(types)) > 1:
        raise NotInThisVersion(f"all layers are of one type, not {list(types)}")
    return {"use_sliding_window": types[0] == _SLIDING, "max_window_layers": 0}
