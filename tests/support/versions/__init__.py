"""Differences between versions of transformers in how a config describes a model.

Tests use the names of the newest version. The code here reads which settings a config class has, never the version.
"""

from __future__ import annotations

from tests.support.versions.caches import caches_need_states, families_have_caches
from tests.support.versions.fields import ConfigClass, PreTrainedConfig, as_part, default_of, fields, parts, stored
from tests.support.versions.layers import NotInThisVersion, default_layer_types, layer_settings
from tests.support.versions.making import make_config
from tests.support.versions.rope import rope_settings

__all__ = [
    "ConfigClass",
    "NotInThisVersion",
    "PreTrainedConfig",
    "as_part",
    "caches_need_states",
    "default_layer_types",
    "default_of",
    "families_have_caches",
    "fields",
    "layer_settings",
    "make_config",
    "parts",
    "rope_settings",
    "stored",
]
