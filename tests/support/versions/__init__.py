"""What differs between versions of transformers in how a config says what a model is.

Tests speak the words of the newest version. All that is read here is what a config class can be told, never a version.
"""

from __future__ import annotations

from tests.support.versions.caches import caches_need_states, families_have_caches
from tests.support.versions.fields import ConfigClass, PreTrainedConfig, as_part, default_of, fields, parts, stored
from tests.support.versions.layers import NotInThisVersion, hear_layers, say_layers
from tests.support.versions.making import make_config
from tests.support.versions.rope import say_rope

__all__ = [
    "ConfigClass",
    "NotInThisVersion",
    "PreTrainedConfig",
    "as_part",
    "caches_need_states",
    "default_of",
    "families_have_caches",
    "fields",
    "hear_layers",
    "make_config",
    "parts",
    "say_layers",
    "say_rope",
    "stored",
]
