"""What users may say of a sink cache: its name, its two sizes, their defaults, and what they may be."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from sink_patch.errors import SinkArgumentError

CACHE_IMPLEMENTATION = "sink"
"""The value of `cache_implementation` that asks for a sink cache."""
CUSTOM_GENERATE = "transformers-community/sink_cache"
"""The value of `custom_generate` that does: the repository that transformers names in place of its old `SinkCache`."""


@dataclass(frozen=True)
class Sizes:
    """How many tokens a sink cache keeps: the only place of the defaults and of the checks.

    Args:
        window_length: tokens that are kept, sinks counted in.
        num_sink_tokens: how many of the first tokens of each row are kept for good.

    Raises:
        SinkArgumentError: not integers, negative, or no room beside the sinks.
    """

    window_length: int = 256
    num_sink_tokens: int = 4

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            _check_number_of_tokens(field.name, value, field.default)
            object.__setattr__(self, field.name, operator.index(value))
        if self.window_length <= self.num_sink_tokens:
            raise SinkArgumentError(
                f"window_length={self.window_length} leaves no room beside num_sink_tokens={self.num_sink_tokens}: the "
                f"window counts the sinks. Use window_length={self.num_sink_tokens + 1} or more."
            )

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in fields(cls))

    @classmethod
    def given_in(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Those of some arguments that are sizes and are not None, unchecked."""
        return {name: arguments[name] for name in cls.names() if arguments.get(name) is not None}

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def _check_number_of_tokens(name: str, value: Any, example: Any) -> None:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise SinkArgumentError(
            f"{name}={value!r} is a {type(value).__name__}. Give a number of tokens: an integer such as {example}."
        )
    if value < 0:
        raise SinkArgumentError(f"{name}={value} is negative. Give a number of tokens, 0 or more.")
