"""What is read, in which ways, and where it is scored."""

from __future__ import annotations

from dataclasses import dataclass

from sink_patch.arguments import Sizes
from sink_patch.errors import SinkArgumentError

DENSE, RECOMPUTED, SINKS, WINDOW, TEXT_POSITIONS = "dense", "recomputed", "sinks", "window", "text-positions"
WAYS = (DENSE, RECOMPUTED, SINKS, WINDOW, TEXT_POSITIONS)
"""In the order of tables."""
IN_ORDER = (SINKS, WINDOW, TEXT_POSITIONS, DENSE, RECOMPUTED)
"""In which they are read: the slowest last."""
_SIZES = Sizes()


@dataclass(frozen=True)
class Plan:
    """What is read, in which ways, and where it is scored.

    Args:
        window_length: tokens in the window, including the sinks.
        num_sink_tokens: first tokens that stay in the window.
        tokens: how many tokens of the text are read.
        every: every so many positions past the first window, one is scored.
        dense_tokens: after so many tokens the dense cache stops, as it takes more memory with each.
        ways: names out of WAYS.

    Raises:
        SinkArgumentError: impossible sizes, an unknown way, or nothing would be scored.
    """

    window_length: int = _SIZES.window_length
    num_sink_tokens: int = _SIZES.num_sink_tokens
    tokens: int = 4096
    every: int = 8
    dense_tokens: int = 16384
    ways: tuple[str, ...] = WAYS

    def __post_init__(self) -> None:
        Sizes(self.window_length, self.num_sink_tokens)  # which checks them
        if self.every < 1:
            raise SinkArgumentError(f"every={self.every}: give 1 to score each position, 8 for every eighth.")
        unknown = [way for way in self.ways if way not in WAYS]
        if unknown or not self.ways:
            raise SinkArgumentError(f"ways={','.join(self.ways)!r}: give one or several of {','.join(WAYS)}.")
        for name in ("tokens", "dense_tokens"):
            if getattr(self, name) < self.window_length + 2:
                raise SinkArgumentError(
                    f"{name}={getattr(self, name)} does not reach past a window of {self.window_length}. Read "
                    f"{self.window_length + 2} tokens or more; with fewer than 4 windows the figures mean little."
                )

    @property
    def positions(self) -> range:
        """Positions whose next token is scored."""
        return range(self.window_length, self.tokens - 1, self.every)

    def end(self, way: str) -> int:
        """How many tokens are read in this way: up to the last score."""
        tokens = min(self.tokens, self.dense_tokens) if way == DENSE else self.tokens
        return range(self.window_length, tokens - 1, self.every)[-1] + 1

    def name(self, way: str) -> str:
        """Of a way, in tables and pictures."""
        return {
            SINKS: f"{self.num_sink_tokens} sinks",
            WINDOW: "window, no sinks",
            TEXT_POSITIONS: f"{self.num_sink_tokens} sinks, positions of the text",
        }.get(way, way)
