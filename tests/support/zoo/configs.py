"""A tiny config of any class: every setting that is a size gets a small value, before anything is allocated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.support.versions import (
    ConfigClass,
    NotInThisVersion,
    PreTrainedConfig,
    as_part,
    default_layer_types,
    default_of,
    fields,
    layer_settings,
    make_config,
    parts,
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
    return tuple(dict.fromkeys(_family(config_class).stack or default_layer_types(config_class) or (FULL,)))


def default_stack(config_class: ConfigClass) -> Stack:
    """Each kind of layer of a family once, and at smallest two layers; only the last kind if kinds cannot be mixed."""
    stack = _family(config_class).stack or kinds_of(config_class)
    try:
        _stack_settings(config_class, stack + stack[-1:] * (2 - len(stack)))
    except NotInThisVersion:
        return stack[-1:] * 2
    return stack + stack[-1:] * (2 - len(stack))


def smallest_stack(config_class: ConfigClass, layer: str) -> Stack:
    """The fewest layers of a valid model that has this kind of layer."""
    *candidates, last = _stacks_with(config_class, layer)
    return next((stack for stack in candidates if _is_valid(config_class, stack)), last)


def _stacks_with(config_class: ConfigClass, layer: str) -> Iterator[Stack]:
    stack = _family(config_class).stack or kinds_of(config_class)
    if found := _family(config_class).smallest.get(layer):
        yield found
    # a cache reads the length of its stream from a layer with keys, if the family has any
    with_keys = [other for other in stack if layer_type(other) not in _WITHOUT_KEYS]
    yield (layer, *(with_keys[:1] if layer_type(layer) in _WITHOUT_KEYS else ()))
    yield stack[: stack.index(layer) + 1]
    yield stack


def _is_valid(config_class: ConfigClass, stack: Stack) -> bool:
    try:
        tiny_config(config_class, stack)
    except Exception:
        return False
    return True


def _stack_settings(config_class: ConfigClass, stack: Stack) -> dict[str, Any]:
    """The settings of this class with which a model has these layers."""
    names = fields(config_class)
    settings: dict[str, Any] = {name: len(stack) for name in DEPTHS if name in names}
    settings |= layer_settings(config_class, [layer_type(layer) for layer in stack])
    if "mlp_layer_types" in names and (types := default_of(config_class, "mlp_layer_types")):
        # dense layers come first; a model of one layer gets the kind that most layers have
        kinds = list(dict.fromkeys(types))
        settings["mlp_layer_types"] = [kinds[max(0, len(kinds) - len(stack) + index)] for index in range(len(stack))]
    return settings | dict(_family(config_class).stack_settings(stack))


def _applies(config_class: ConfigClass, name: str) -> bool:
    """Whether this is a setting of the class, or one that all text models have even if their configs do not name it."""
    names = fields(config_class)
    return name in names or ("vocab_size" in names and (name in stored(config_class) or name in TOKEN_IDS))


def tiny_config(config_class: ConfigClass, stack: Stack | None = None, **overrides: Any) -> PreTrainedConfig:
    """A tiny config; `stack` and `overrides` apply to its decoder."""
    decoder, family, names = decoder_of(config_class), _family(config_class), fields(config_class)
    settings: dict[str, Any] = {
        # a setting without a default is derived from others, or switches something off
        name: size
        for name, size in SIZES.items()
        if name in names and (names[name] not in _UNSET or name in ALSO_WHERE_UNSET)
    }
    settings |= {name: value for name, value in ALWAYS.items() if _applies(config_class, name)}
    own_stack = stack if decoder is config_class else None
    settings |= _stack_settings(config_class, own_stack or default_stack(config_class))
    settings |= {**family.settings, **family.parts()}
    for key, part in parts(config_class).items():
        if key not in settings:
            made = tiny_config(part, stack, **overrides) if part is decoder else tiny_config(part)
            settings[key] = as_part(config_class, made)
    return make_config(config_class, settings | (overrides if decoder is config_class else {}))
