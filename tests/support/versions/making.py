"""A config from settings in the names of the newest version."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.support.versions.fields import ConfigClass, PreTrainedConfig, flags, typed
from tests.support.versions.layers import layer_settings
from tests.support.versions.rope import rope_settings


def make_config(config_class: ConfigClass, settings: Mapping[str, Any]) -> PreTrainedConfig:
    """A config with the meaning that `layer_types` and `rope_parameters` have in the newest version."""
    given = rope_settings(config_class, settings)
    if "layer_types" in given:
        given |= layer_settings(config_class, given.pop("layer_types"))
    return config_class(**typed(config_class, {**flags(config_class), **given}))
