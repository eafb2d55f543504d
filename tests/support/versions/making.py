"""A config from settings in the words of the newest version."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.support.versions.fields import ConfigClass, PreTrainedConfig, flags, typed
from tests.support.versions.layers import say_layers
from tests.support.versions.rope import say_rope


def make_config(config_class: ConfigClass, settings: Mapping[str, Any]) -> PreTrainedConfig:
    """A config that means what these settings mean in the newest version, as to `layer_types` and `rope_parameters`."""
    said = say_rope(config_class, settings)
    if "layer_types" in said:
        said |= say_layers(config_class, said.pop("layer_types"))
    return config_class(**typed(config_class, {**flags(config_class), **said}))
