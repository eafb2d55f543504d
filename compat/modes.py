"""The name of the decoding mode, from what `_prepare_cache_for_generation` is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def given_mode(given: Mapping[str, Any]) -> str:
    """4.57 and newer: it is an argument."""
    mode = given.get("generation_mode")
    return str(getattr(mode, "value", mode))


def mode_of_config(given: Mapping[str, Any]) -> str:
    """Up to 4.56: the assistant model is the argument, and the config tells the rest."""
    return str(given["generation_config"].get_generation_mode(given.get("assistant_model")).value)
