"""Memory and time a token: what is measured, as a table, and as a picture."""

from __future__ import annotations

from dataclasses import dataclass

from sink_patch.arguments import Sizes
from sink_patch.errors import SinkArgumentError
from sink_patch.evaluate.measures.plots import Curve, Panel
from sink_patch.evaluate.measures.records import Record

_SIZES = Sizes()
_TOKENS_OF_A_BLOCK, ROUNDS = 16, 5


@dataclass(frozen=True)
class Plan:
    """Which caches are measured, and after how many tokens.

    Args:
        window_length: tokens in the window, including the sinks.
        num_sink_tokens: first tokens that stay in the window.
        windows: rising lengths of the stream, in windows.

    Raises:
        SinkArgumentError: impossible sizes or lengths.
    """

    window_length: int = _SIZES.window_length
    num_sink_tokens: int = _SIZES.num_sink_tokens
    windows: tuple[int, ...] = (1, 2, 4, 8, 16)

    def __post_init__(self) -> None:
        Sizes(self.window_length, self.num_sink_tokens)  # which checks them
        if self.windows[0] < 1 or list(self.windows) != sorted(set(self.windows)):
            raise SinkArgumentError(f"windows={self.windows}: give numbers that rise, such as 1,2,4,8.")
        if self.window_length < ROUNDS:
            raise SinkArgumentError(
                f"window_length={self.window_length} is too short to measure in. Use {ROUNDS} or more."
            )

    @property
    def block(self) -> int:
        """Tokens of a block; all rounds of blocks together are shorter than a window."""
        return min(_TOKENS_OF_A_BLOCK, self.window_length // ROUNDS)


def table(record: Record) -> str:
    """A line for each length: milliseconds a token, and megabytes of the cache and of the process, of both caches."""
    dense, sinks = record["rows"]
    heads = [f"{cache['name']} {unit}" for unit in ("ms/token", "cache MB", "process MB") for cache in (dense, sinks)]
    lines = ["  ".join(f"{head:>17}" for head in ["tokens", *heads])]
    for place, tokens in enumerate(record["tokens"]):
        times = [f"{row['ms_a_token'][place]:.1f}" for row in (dense, sinks)]
        memory = [_megabytes(row[key][place]) for key in ("cache_bytes", "process_bytes") for row in (dense, sinks)]
        lines.append("  ".join(f"{cell:>17}" for cell in [f"{tokens:,}", *times, *memory]))
    title = f"{record['model']}, {record['dtype']}, window of {record['window_length']}, {record['threads']} thread(s)"
    return f"{title}\n\n" + "\n".join(lines)


def panels(record: Record) -> list[Panel]:
    """The curves of a record: memory and time a token, over tokens."""
    tokens = record["tokens"]
    times = [Curve(row["name"], tokens, row["ms_a_token"]) for row in record["rows"]]
    memory = [
        Curve(f"{row['name']}{word}", tokens, [count / 1e6 for count in row[key]])
        for key, word in (("cache_bytes", ""), ("process_bytes", ", whole process"))
        for row in record["rows"]
        if None not in row[key]
    ]
    return [
        Panel("Memory", "tokens", "MB", tuple(memory), log_x=True, log_y=True),
        Panel("Latency", "tokens", "ms a token", tuple(times), log_x=True, from_zero=True),
    ]


def _megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:.1f}"
