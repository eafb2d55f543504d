"""How many layers of sink_patch lie around the methods of transformers that it wraps."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from transformers.generation.utils import GenerationMixin

METHODS = ("_prepare_generation_config", "_prepare_cache_for_generation")


def ours(name: str) -> int:
    """Counted along the whole chain: other libraries may have put layers of theirs around ours, or below."""
    function, count = vars(GenerationMixin)[name], 0
    while function is not None:
        count += getattr(getattr(function, "_self_wrapper", None), "__module__", "").startswith("sink_patch")
        function = getattr(function, "__wrapped__", None)
    return count


def peel(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The methods as transformers wrote them, for the time of a test."""
    originals = {name: inspect.unwrap(vars(GenerationMixin)[name]) for name in METHODS}
    for name, original in originals.items():
        monkeypatch.setattr(GenerationMixin, name, original)
    return originals
