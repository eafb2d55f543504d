"""The two arguments of a sink cache: names, defaults, and what they may be."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from sink_patch.errors import SinkArgumentError

DEFAULT_WINDOW_LENGTH = 256
DEFAULT_NUM_SINK_TOKENS = 4
ARGUMENTS = {"window_length": DEFAULT_WINDOW_LENGTH, "num_sink_tokens": DEFAULT_NUM_SINK_TOKENS}


def check_window(window_length: Any, num_sink_tokens: Any) -> tuple[int, int]:
    """Both as ints.

    Raises:
        SinkArgumentError: not integers, negative, or no room beside the sinks.
    """
    for name, value in (("window_length", window_length), ("num_sink_tokens", num_sink_tokens)):
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise SinkArgumentError(
                f"{name}={value!r} is a {type(value).__name__}. Give a number of tokens: an integer such as "
                f"{ARGUMENTS[name]}."
            )
        if value < 0:
            raise SinkArgumentError(f"{name}={value} is negative. Give a number of tokens, 0 or more.")
    if window_length <= num_sink_tokens:
        raise SinkArgumentError(
            f"window_length={window_length} leaves no room beside num_sink_tokens={num_sink_tokens}: the window counts "
            f"the sinks. Use window_length={num_sink_tokens + 1} or more."
        )
    return operator.index(window_length), operator.index(num_sink_tokens)


@dataclass(frozen=True)
class Sizes:
    window_length: int = DEFAULT_WINDOW_LENGTH
    num_sink_tokens: int = DEFAULT_NUM_SINK_TOKENS

    def __post_init__(self) -> None:
        window_length, num_sink_tokens = check_window(self.window_length, self.num_sink_tokens)
        object.__setattr__(self, "window_length", window_length)
        object.__setattr__(self, "num_sink_tokens", num_sink_tokens)
