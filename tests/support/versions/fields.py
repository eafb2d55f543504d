"""What a config class can be told, and the configs inside it: dataclass fields, or arguments of `__init__` before."""

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
    """The named arguments of an `__init__` that was written by hand; a generated one has fields instead."""
    if "__init__" not in vars(owner) or "__dataclass_fields__" in vars(owner):
        return {}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = inspect.signature(owner.__init__).parameters
    return {name: spec for name, spec in found.items() if spec.kind in named and name != "self"}


def flags(config_class: ConfigClass) -> dict[str, Any]:
    """Defaults that a class must be told, as it refuses its own: flags that it takes for numbers."""
    return {
        name: int(default) for name in _numbers(config_class) if isinstance(default := fields(config_class)[name], bool)
    }


def typed(config_class: ConfigClass, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, with numbers for flags that the class takes for numbers."""
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
    except Exception:  # some composite configs need to be told their parts
        return None


def stored(config_class: ConfigClass) -> Mapping[str, Any]:
    """What the default config holds, properties left out."""
    return vars(_default(config_class)) if _default(config_class) else {}


def default_of(config_class: ConfigClass, name: str) -> Any:
    """What the default config says of a setting; None where it says nothing."""
    return copy.deepcopy(getattr(_default(config_class), name, None))


@functools.cache
def parts(config_class: ConfigClass) -> Mapping[str, ConfigClass]:
    """The configs inside a config; those that are optional are left out."""
    if specs := getattr(config_class, "sub_configs_defaults", None):
        return {key: _class_of(spec) for key, spec in specs.items() if not spec.optional}
    named = {key: part for key, part in config_class.sub_configs.items() if issubclass(part, PreTrainedConfig)}
    return named | {key: type(part) for key, part in stored(config_class).items() if isinstance(part, PreTrainedConfig)}


def as_part(config_class: ConfigClass, part: PreTrainedConfig) -> PreTrainedConfig | dict[str, Any]:
    """A config for a place inside one of this class; an `__init__` that was written by hand takes what a file holds."""
    return part.to_diff_dict() if _arguments(config_class) else part


def _class_of(spec: Any) -> ConfigClass:
    """An `AutoConfig` goes by a model type."""
    if issubclass(spec.config_class, PreTrainedConfig):
        return spec.config_class
    return CONFIG_MAPPING[spec.model_type]
