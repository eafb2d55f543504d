"""The general rule: a config with every size-like setting made small, before anything is allocated."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from tests.support.zoo.families import FAMILIES, FULL, Family, Stack, layer_type
from tests.support.zoo.sizes import ALSO_WHERE_UNSET, ALWAYS, DEPTHS, SIZES

ConfigClass = type[PreTrainedConfig]
_UNSET = (None, "auto", 0)
_DECODERS = ("text_config", "decoder")
_WITHOUT_KEYS = frozenset({"linear_attention", "conv", "moe", "mlp"})


def _family(config_class: ConfigClass) -> Family:
    return FAMILIES.get(config_class.model_type, Family())


@functools.cache
def _parts(config_class: ConfigClass) -> dict[str, ConfigClass]:
    """The configs inside a config; those that are optional are left out."""
    specs = {key: spec for key, spec in config_class.sub_configs_defaults.items() if not spec.optional}
    return {
        key: spec.config_class if issubclass(spec.config_class, PreTrainedConfig) else CONFIG_MAPPING[spec.model_type]
        for key, spec in specs.items()
    }


def decoder_of(config_class: ConfigClass) -> ConfigClass:
    """The config class that describes the text decoder."""
    parts = _parts(config_class)
    return next((parts[key] for key in _DECODERS if key in parts), config_class)


@functools.cache
def _kinds(config_class: ConfigClass, name: str) -> Stack:
    """The different entries of a list with one entry a layer, in the order in which the default config has them."""
    return tuple(dict.fromkeys(getattr(config_class(), name, None) or ()))


def default_stack(config_class: ConfigClass) -> Stack:
    """Each kind of layer of a family once, and two layers at least."""
    stack = _family(config_class).stack
    stack = stack or _kinds(config_class, "layer_types") or _kinds(config_class, "layers_block_type") or (FULL,)
    return stack + stack[-1:] * (2 - len(stack))


def least_stack(config_class: ConfigClass, layer: str) -> Stack:
    """The fewest layers with which there can be this one."""
    if found := _family(config_class).least.get(layer):
        return found
    # where a family has layers with keys, the length of a stream is asked of one of them
    with_keys = [other for other in default_stack(config_class) if layer_type(other) not in _WITHOUT_KEYS]
    return (layer, *(with_keys[:1] if layer_type(layer) in _WITHOUT_KEYS else ()))


def _spelled(config_class: ConfigClass, names: frozenset[str], stack: Stack) -> dict[str, Any]:
    """How a config of this class says that these are its layers."""
    types = [layer_type(layer) for layer in stack]
    said: dict[str, Any] = {name: len(stack) for name in DEPTHS if name in names}
    said |= {name: types for name in ("layer_types", "layers_block_type") if name in names}
    if "mlp_layer_types" in names and (kinds := _kinds(config_class, "mlp_layer_types")):
        # dense layers come first; a model of one layer gets the kind that most layers are of
        said["mlp_layer_types"] = [kinds[max(0, len(kinds) - len(stack) + index)] for index in range(len(stack))]
    return said | dict(_family(config_class).spell(stack))


def tiny_config(config_class: ConfigClass, stack: Stack | None = None, **overrides: Any) -> PreTrainedConfig:
    """A tiny config; `stack` and `overrides` are meant for its decoder."""
    decoder, family = decoder_of(config_class), _family(config_class)
    fields = {spec.name: spec.default for spec in dataclasses.fields(config_class)}
    settings: dict[str, Any] = {
        # what has no default is derived from other settings, or switched off
        name: size
        for name, size in SIZES.items()
        if name in fields and (fields[name] not in _UNSET or name in ALSO_WHERE_UNSET)
    }
    settings |= {name: value for name, value in ALWAYS.items() if name in fields}
    own_stack = stack if decoder is config_class else None
    settings |= _spelled(config_class, frozenset(fields), own_stack or default_stack(config_class))
    settings |= {**family.settings, **family.parts()}
    for key, part in _parts(config_class).items():
        if key not in settings:
            settings[key] = tiny_config(part, stack, **overrides) if part is decoder else tiny_config(part)
    return config_class(**settings | (overrides if decoder is config_class else {}))
