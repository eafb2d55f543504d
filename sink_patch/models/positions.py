"""How far a model's positions reach, read from its config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sink_patch.compat.models import rope_parameters
from sink_patch.models.families.family import Family

_FREQUENCIES_CHANGE = ("dynamic", "longrope")  # rope types whose frequencies change past the original context
_DEFAULT_LENGTH = 2048


@dataclass(frozen=True)
class Context:
    """Which positions a model can use.

    Args:
        length: tokens of the context that the model was trained on (the original one, where the rope type has one).
        limit: number of positions that may be used at all; None: there is no limit.
        why_limited: the reason, for error messages; the end of "it may use 2048 positions, as ...".
    """

    length: int
    limit: int | None = None
    why_limited: str = ""

    @property
    def largest_probe_position(self) -> int:
        return self.length - 1


def read_context(config: Any, family: Family | None) -> Context:
    """Read a text config, and the position limit of its family (None: no family claims the model)."""
    length = getattr(config, "max_position_embeddings", None) or _DEFAULT_LENGTH
    rope_types, originals = [], []
    for parameters in _each_rope_parameters(config):
        rope_types.append(parameters.get("rope_type", parameters.get("type", "default")))
        originals.append(parameters.get("original_max_position_embeddings"))
    originals.append(getattr(config, "original_max_position_embeddings", None))
    length = min([length, *(original for original in originals if original)])
    if family is None:
        return Context(
            length, length, "no family is registered for it and nothing is known about positions past its context"
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


def _each_rope_parameters(config: Any) -> Iterator[Mapping[str, Any]]:
    """The rope parameters of a text config; where layer types have their own, each of those in turn."""
    parameters = rope_parameters(config)
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    yield from nested or [parameters]
