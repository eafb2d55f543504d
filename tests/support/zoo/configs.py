"""The general rule: a config with every size-like setting made small, before anything is allocated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.support.versions import (
    ConfigClass,
    NotInThisVersion,
    PreTrainedConfig,
    as_part,
    default_of,
    fields,
    hear_layers,
    make_config,
    parts,
    say_layers,
    stored,
)
from tests.support.zoo.families import FAMILIES, FULL, Family, Stack, layer_type
from tests.support.zoo.sizes import ALSO_WHERE_UNSET, ALWAYS, DEPTHS, SIZES, TOKEN_IDS

_UNSET = (None, "auto", 0)
_DECODERS = ("text_config", "decoder")
_WITHOUT_KEYS = frozenset({"linear_attention", "conv", "moe", "mlp"})


def _family(config_class: ConfigClass) -> Family:
    return FAMILIES.get(config_class.model_type, Family())


def decoder_of(config_class: ConfigClass) -> ConfigClass:
    """The config class that describes the text decoder."""
    inside = parts(config_class)
    return next((inside[key] for key in _DECODERS if key in inside), config_class)


def kinds_of(config_class: ConfigClass) -> Stack:
    """Each kind of layer of a family once."""
    return tuple(dict.fromkeys(_family(config_class).stack or hear_layers(config_class) or (FULL,)))


def default_stack(config_class: ConfigClass) -> Stack:
    """Each kind of layer of a family once, and two layers at least; the last kind alone where they cannot be mixed."""
    stack = _family(config_class).stack or kinds_of(config_class)
    try:
        _spelled(config_class, stack + stack[-1:] * (2 - len(stack)))
    except NotInThisVersion:
        return stack[-1:] * 2
    return stack + stack[-1:] * (2 - len(stack))


def least_stack(config_class: ConfigClass, layer: str) -> Stack:
    """The fewest layers with which there can be this one."""
    *candidates, last = _stacks_with(config_class, layer)
    return next((stack for stack in candidates if _can_be(config_class, stack)), last)


def _stacks_with(config_class: ConfigClass, layer: str) -> Iterator[Stack]:
    stack = _family(config_class).stack or kinds_of(config_class)
    if found := _family(config_class).least.get(layer):
        yield found
    # where a family has layers with keys, the length of a stream is asked of one of them
    with_keys = [other for other in stack if layer_type(other) not in _WITHOUT_KEYS]
    yield (layer, *(with_keys[:1] if layer_type(layer) in _WITHOUT_KEYS else ()))
    yield stack[: stack.index(layer) + 1]
    yield stack


def _can_be(config_class: ConfigClass, stack: Stack) -> bool:
    try:
        tiny_config(config_class, stack)
    except Exception:
        return False
    return True


def _spelled(config_class: ConfigClass, stack: Stack) -> dict[str, Any]:
    """How a config of this class says that these are its layers."""
    names = fields(config_class)
    said: dict[str, Any] = {name: len(stack) for name in DEPTHS if name in names}
    said |= say_layers(config_class, [layer_type(layer) for layer in stack])
    if "mlp_layer_types" in names and (types := default_of(config_class, "mlp_layer_types")):
        # dense layers come first; a model of one layer gets the kind that most layers are of
        kinds = list(dict.fromkeys(types))
        said["mlp_layer_types"] = [kinds[max(0, len(kinds) - len(stack) + index)] for index in range(len(stack))]
    return said | dict(_family(config_class).spell(stack))


def _is_asked_for(config_class: ConfigClass, name: str) -> bool:
    """Is this a setting of the class, or one that all models of text have, whether their configs name it or not?"""
    names = fields(config_class)
    return name in names or ("vocab_size" in names and (name in stored(config_class) or name in TOKEN_IDS))


def tiny_config(config_class: ConfigClass, stack: Stack | None = None, **overrides: Any) -> PreTrainedConfig:
    """A tiny config; `stack` and `overrides` are meant for its decoder."""
    decoder, family, names = decoder_of(config_class), _family(config_class), fields(config_class)
    settings: dict[str, Any] = {
        # what has no default is derived from other settings, or switched off
        name: size
        for name, size in SIZES.items()
        if name in names and (names[name] not in _UNSET or name in ALSO_WHERE_UNSET)
    }
    settings |= {name: value for name, value in ALWAYS.items() if _is_asked_for(config_class, name)}
    own_stack = stack if decoder is config_class else None
    settings |= _spelled(config_class, own_stack or default_stack(config_class))
    settings |= {**family.settings, **family.parts()}
    for key, part in parts(config_class).items():
        if key not in settings:
            made = tiny_config(part, stack, **overrides) if part is decoder else tiny_config(part)
            settings[key] = as_part(config_class, made)
    return make_config(config_class, settings | (overrides if decoder is config_class else {}))
