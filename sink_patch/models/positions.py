"""How far a model's positions reach, read from its config."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sink_patch.models.families.family import Family

_FREQUENCIES_CHANGE = ("dynamic", "longrope")  # rope types whose frequencies change past the original context
_DEFAULT_LENGTH = 2048


@dataclass(frozen=True)
class Context:
    """Positions of a model.

    Args:
        length: tokens of the context that the model was trained on (the original one, where the rope type has one).
        limit: number of positions that may be used at all; None: as many as one likes.
        why_limited: for people.
    """

    length: int
    limit: int | None = None
    why_limited: str = ""

    @property
    def largest_probe_position(self) -> int:
        return self.length - 1


def read_context(config: Any, family: Family | None) -> Context:
    """From the text config and what its family knows of it."""
    length = getattr(config, "max_position_embeddings", None) or _DEFAULT_LENGTH
    rope_types, originals = [], []
    for parameters in _rope_parameters(config):
        rope_types.append(parameters.get("rope_type", parameters.get("type", "default")))
        originals.append(parameters.get("original_max_position_embeddings"))
    originals.append(getattr(config, "original_max_position_embeddings", None))
    length = min([length, *(original for original in originals if original)])
    if family is None:
        return Context(
            length, length, "no family is registered for it and nothing is known of positions past its context"
        )
    if family.position_limit is not None:
        limit = min(length, family.position_limit.of(config))
        return Context(limit, limit, family.position_limit.why)
    changing = sorted(set(rope_types) & set(_FREQUENCIES_CHANGE))
    if changing:
        return Context(
            length, length, f"its rope type {changing[0]!r} changes the frequencies past the original context"
        )
    return Context(length)


def _rope_parameters(config: Any) -> Iterator[dict[str, Any]]:
    """The dict or dicts (one for each layer type) of rope parameters; 4.x calls them `rope_scaling`."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    yield from nested or [parameters]
