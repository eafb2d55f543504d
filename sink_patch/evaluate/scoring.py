"""Ways to read a long text with a window of W tokens, scored on the same positions.

A score is the negative log-likelihood, in nats, of token p + 1 after the model has read token p, at chosen positions p.
All ways see W tokens at such a position, token p counted in, so that scores can be compared one by one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import sink_patch
from sink_patch.models.entries import cache_argument

Progress = Callable[[int, int], None]  # (tokens or positions done, of how many)

_WINDOWS_AT_ONCE = 4


@dataclass(frozen=True, eq=False)
class Reading:
    """What is read, and where it is scored.

    Args:
        model: a causal language model of transformers.
        ids: token ids, shape [tokens].
        positions: rising, from `window_length` on, the last one below tokens - 1.
        window_length: tokens seen at each position.
        progress: told now and then how far a way has come.
    """

    model: Any
    ids: torch.Tensor
    positions: range
    window_length: int
    progress: Progress

    @property
    def end(self) -> int:
        """How many tokens have to be read for the last score."""
        return self.positions[-1] + 1

    def score(self, logits: torch.Tensor, positions: list[int]) -> torch.Tensor:
        """Scores [positions] from logits [positions, vocabulary]."""
        targets = self.ids[[position + 1 for position in positions]]
        return nn.functional.cross_entropy(logits.float(), targets, reduction="none")

    def forward(self, ids: torch.Tensor, last: int, cache: Any = None, **options: Any) -> torch.Tensor:
        """Logits [rows, last, vocabulary] of ids [rows, tokens]; a small model spends half its time on the others."""
        if cache is not None:
            options[cache_argument(self.model)] = cache
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            options["logits_to_keep"] = last if last else torch.empty(0, dtype=torch.long)
        logits: torch.Tensor = self.model(ids, **options).logits
        return logits[:, logits.shape[1] - last :]


def streamed(reading: Reading, num_sink_tokens: int) -> torch.Tensor:
    """Scores [positions] of one pass with a `SinkCache`: the first window in one forward, then token by token.

    Raises:
        SinkArgumentError: impossible sizes.
        UnsupportedModelError: the model cannot stream.
    """
    window = reading.window_length
    cache = sink_patch.SinkCache(window, num_sink_tokens, model=reading.model)
    reading.forward(reading.ids[None, :window], 0, cache)
    scores = []
    for position in range(window, reading.end):
        wanted = position in reading.positions
        logits = reading.forward(reading.ids[None, position : position + 1], int(wanted), cache)
        if wanted:
            scores.append(reading.score(logits[0], [position]))
        reading.progress(position + 1, reading.end)
    return torch.cat(scores)


def recomputed(reading: Reading, bos: int | None = None) -> torch.Tensor:
    """Scores [positions] of a forward without cache over the newest W tokens, for each position anew: slow, and exact.

    Args:
        reading: what is read.
        bos: token that stands first in each window, in place of the oldest one, for a model that was always given it.
    """
    scores: list[torch.Tensor] = []
    for start in range(0, len(reading.positions), _WINDOWS_AT_ONCE):
        chunk = list(reading.positions[start : start + _WINDOWS_AT_ONCE])
        windows = torch.stack([reading.ids[p + 1 - reading.window_length : p + 1] for p in chunk])  # [chunk, W]
        if bos is not None:
            windows[:, 0] = bos
        logits = reading.forward(windows, 1, use_cache=False)
        scores.append(reading.score(logits[:, 0], chunk))
        reading.progress(start + len(chunk), len(reading.positions))
    return torch.cat(scores)


def without_new_positions(reading: Reading, num_sink_tokens: int) -> torch.Tensor:
    """Scores [positions] where a token sees what it sees in a `SinkCache`, but all stay at their places in the text.

    The sinks fall ever farther behind. Nothing is re-rotated then, so a mask over one long plain cache says it all.
    """
    from transformers import DynamicCache

    cache, scores = DynamicCache(), []
    for start in range(0, reading.end, reading.window_length):
        stop = min(start + reading.window_length, reading.end)
        logits = reading.forward(
            reading.ids[None, start:stop],
            stop - start,
            cache=cache,
            attention_mask=_sink_mask(start, stop, reading, num_sink_tokens),
            position_ids=torch.arange(start, stop)[None],
        )
        chunk = [position for position in reading.positions if start <= position < stop]
        if chunk:
            scores.append(reading.score(logits[0, [position - start for position in chunk]], chunk))
        reading.progress(stop, reading.end)
    return torch.cat(scores)


def _sink_mask(start: int, stop: int, reading: Reading, num_sink_tokens: int) -> torch.Tensor:
    """Additive mask [1, 1, stop - start, stop]: a token sees the sinks and the newest others, W in all."""
    query = torch.arange(start, stop)[:, None]
    key = torch.arange(stop)[None, :]
    recent = query - key < reading.window_length - num_sink_tokens
    visible = (key <= query) & (recent | (key < num_sink_tokens) | (query < reading.window_length))
    dtype: torch.dtype = reading.model.dtype
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
    return mask[None, None]
