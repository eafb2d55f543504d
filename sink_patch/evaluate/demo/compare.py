"""One text, read in three ways beside each other: all tokens kept, a window without sinks, and one with sinks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch

import sink_patch
from sink_patch.errors import SinkArgumentError
from sink_patch.evaluate.demo.screens import Screen
from sink_patch.evaluate.measures.memory import cache_bytes
from sink_patch.evaluate.measures.perplexity.scoring import Reading
from sink_patch.evaluate.models import Loaded

SINKS = 4
_PIECE = 16  # tokens in a forward: nearly as cheap as one, where reading the weights takes most of the time
_WINDOWS = 6


@dataclass(frozen=True)
class Point:
    """How the ways stand after so many tokens.

    Args:
        tokens: that have been read.
        perplexity: of the newest window of tokens, for each way.
        megabytes: of the cache in 10^6 bytes, for each way.
    """

    tokens: int
    perplexity: tuple[float, ...]
    megabytes: tuple[float, ...]


def ways(num_sink_tokens: int) -> tuple[str, ...]:
    """The names of the three ways."""
    return "every token kept", "window, no sinks", f"window, {num_sink_tokens} sinks"


def show(loaded: Loaded, ids: torch.Tensor, window_length: int, num_sink_tokens: int, screen: Screen) -> list[Point]:
    """Read the ids [tokens] of the text, and show the figures as they come."""
    screen.line(
        f"\nThe same model now reads {len(ids)} tokens of Pride and Prejudice, which none of the three ways has "
        f"written, three times side by side: with plain transformers' cache of all tokens, with a window of "
        f"{window_length} without sinks, and with the same window and {num_sink_tokens} sinks. Shown are perplexity "
        "over the newest window of tokens (lower is better) and the size of the cache.\n"
    )
    rows: list[list[str]] = [["tokens read", *ways(num_sink_tokens)]]
    points: list[Point] = []
    with screen:
        for point in read(loaded.model, ids, window_length, num_sink_tokens):
            cells = (f"{one:.1f} in {size:.1f} MB" for one, size in zip(point.perplexity, point.megabytes, strict=True))
            row = [str(point.tokens), *cells]
            is_window = point.tokens // window_length > (points[-1].tokens if points else 0) // window_length
            screen.table([*rows, row], is_window=is_window)
            points.append(point)
            if is_window:
                rows.append(row)
    return points


def text_ids(loaded: Loaded, window_length: int) -> torch.Tensor:
    """The ids [tokens] of the text, some windows of it.

    Raises:
        SinkArgumentError: there are less than two windows.
    """
    text = resources.files("sink_patch.evaluate.demo").joinpath("text.txt").read_text(encoding="utf-8")
    ids: torch.Tensor = loaded.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    if len(ids) < 2 * window_length:
        raise SinkArgumentError(
            f"The text for the comparison has {len(ids)} tokens, which are less than two windows of {window_length}. "
            f"Use --window-length {len(ids) // 2} or less here; for longer windows: sink-patch eval perplexity."
        )
    return ids[: _WINDOWS * window_length + 1]  # the last one is only scored


@torch.inference_mode()
def read(model: Any, ids: torch.Tensor, window_length: int, num_sink_tokens: int) -> Iterator[Point]:
    """A point after each piece of the text. All ways read the same pieces, in one forward each.

    In the windows the last token of a piece sees `window_length` tokens, and the first one the older of these alone.

    Args:
        model: a causal language model of transformers.
        ids: token ids, shape [tokens].
        window_length, num_sink_tokens: of the windows.
    """
    from transformers import DynamicCache

    caches: tuple[Any, ...] = (
        DynamicCache(),
        sink_patch.SinkCache(window_length, 0, model=model),
        sink_patch.SinkCache(window_length, num_sink_tokens, model=model),
    )
    piece = max(1, min(_PIECE, window_length - num_sink_tokens))
    reading = Reading(model, ids, range(0), window_length)
    scores: list[list[float]] = [[] for _ in caches]
    for start in range(0, len(ids) - 1, piece):
        positions = list(range(start, min(start + piece, len(ids) - 1)))
        for cache, found in zip(caches, scores, strict=True):
            # logits: [1, positions, vocabulary]
            logits, _ = reading.forward(ids[None, positions], range(len(positions)), cache)
            found.extend(reading.score(logits[0], positions).tolist())
            del found[:-window_length]
        perplexity = tuple(math.exp(math.fsum(found) / len(found)) for found in scores)
        yield Point(positions[-1] + 1, perplexity, tuple(cache_bytes(cache) / 1e6 for cache in caches))
