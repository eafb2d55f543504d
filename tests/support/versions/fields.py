"""The settings of a config class, and the configs inside it: dataclass fields, or arguments of an old `__init__`."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Mapping
from typing import Any

import transformers
from transformers import CONFIG_MAPPING

PreTrainedConfig = getattr(transformers, "PreTrainedConfig", None) or transformers.PretrainedConfig
ConfigClass = type[PreTrainedConfig]


@functools.cache
def fields(config_class: ConfigClass) -> Mapping[str, Any]:
    """The settings of a config class by name, with their defaults; None where there is none."""
    found = {spec.name: spec.default for spec in _dataclass_fields(config_class)}
    for owner in reversed(config_class.__mro__[: config_class.__mro__.index(PreTrainedConfig)]):
        found |= {name: spec.default for name, spec in _arguments(owner).items()}
    return {name: None if default is inspect.Parameter.empty else default for name, default in found.items()}


def _dataclass_fields(config_class: ConfigClass) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(config_class) if dataclasses.is_dataclass(config_class) else ()


def _arguments(owner: type) -> dict[str, inspect.Parameter]:
    """The named arguments of a hand-written `__init__`; a generated one has fields instead."""
    if "__init__" not in vars(owner) or "__dataclass_fields__" in vars(owner):
        return {}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = inspect.signature(owner.__init__).parameters
    return {name: spec for name, spec in found.items() if spec.kind in named and name != "self"}


def flags(config_class: ConfigClass) -> dict[str, Any]:
    """Flags whose field has the type int, as numbers: such a class refuses its own default."""
    return {
        name: int(default) for name in _numbers(config_class) if isinstance(default := fields(config_class)[name], bool)
    }


def typed(config_class: ConfigClass, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, with flags as numbers where the field has the type int."""
    numbers = _numbers(config_class)
    return {
        name: int(value) if name in numbers and isinstance(value, bool) else value for name, value in settings.items()
    }


@functools.cache
def _numbers(config_class: ConfigClass) -> frozenset[str]:
    return frozenset(spec.name for spec in _dataclass_fields(config_class) if spec.type in (int, int | None))


@functools.cache
def _default(config_class: ConfigClass) -> PreTrainedConfig | None:
    try:
        return config_class(**flags(config_class))
    except Exception:  # some composite configs cannot be made without their parts
        return None


def stored(config_class: ConfigClass) -> Mapping[str, Any]:
    """The attributes of the default config, without properties."""
    return vars(_default(config_class)) if _default(config_class) else {}


def default_of(config_class: ConfigClass, name: str) -> Any:
    """The value of a setting in the default config; None: it has no such setting."""
    return copy.deepcopy(getattr(_default(config_class), name, None))


@functools.cache
def parts(config_class: ConfigClass) -> Mapping[str, ConfigClass]:
    """The classes of the configs inside a config, by name, without optional ones."""
    if specs := getattr(config_class, "sub_configs_defaults", None):
        return {key: _class_of(spec) for key, spec in specs.items() if not spec.optional}
    named = {key: part for key, part in config_class.sub_configs.items() if issubclass(part, PreTrainedConfig)}
    return named | {key: type(part) for key, part in stored(config_class).items() if isinstance(part, PreTrainedConfig)}


def as_part(config_class: ConfigClass, part: PreTrainedConfig) -> PreTrainedConfig | dict[str, Any]:
    """A config as an argument of this class: a hand-written `__init__` takes a dict, as from a file."""
    return part.to_diff_dict() if _arguments(config_class) else part


def _class_of(spec: Any) -> ConfigClass:
    """The config class; for an `AutoConfig`, that of its model type."""
    if issubclass(spec.config_class, PreTrainedConfig):
        return spec.config_class
    return CONFIG_MAPPING[spec.model_type]
