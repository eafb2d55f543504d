"""Count and remove the wrappers of sink_patch around methods of transformers."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from transformers.generation.utils import GenerationMixin

METHODS = ("_prepare_generation_config", "_prepare_cache_for_generation")


def ours(name: str) -> int:
    """How many wrappers of sink_patch a method has. Other libraries may have wrapped it before or after."""
    function, count = vars(GenerationMixin)[name], 0
    while function is not None:
        count += getattr(getattr(function, "_self_wrapper", None), "__module__", "").startswith("sink_patch")
        function = getattr(function, "__wrapped__", None)
    return count


def peel(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replace the wrapped methods by transformers' originals during a test; returns the originals."""
    originals = {name: inspect.unwrap(vars(GenerationMixin)[name]) for name in METHODS}
    for name, original in originals.items():
        monkeypatch.setattr(GenerationMixin, name, original)
    return originals
