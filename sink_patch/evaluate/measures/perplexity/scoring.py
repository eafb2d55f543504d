"""Ways to read a long text with a window of W tokens, scored on the same positions.

A score is the negative log-likelihood, in nats, of token p + 1 after the model has read token p, at chosen positions p.
All ways see W tokens at such a position, token p counted in, so that scores can be compared one by one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

import sink_patch

Progress = Callable[[range], Iterable[int]]
"""Wraps the range that a way of reading loops over, as `tqdm` does; `iter` shows nothing."""

_CACHE_ARGUMENTS = ("cache", "past_key_values")  # of forwards, by the version of transformers
_WINDOWS_AT_ONCE = 4


@dataclass(frozen=True, eq=False)
class Reading:
    """What is read, and where it is scored.

    Args:
        model: a causal language model of transformers.
        ids: token ids, shape [tokens].
        positions: rising, from `window_length` on, the last one below tokens - 1.
        window_length: tokens seen at each position.
        progress: shows how far the loop over the text is.
    """

    model: Any
    ids: torch.Tensor
    positions: range
    window_length: int
    progress: Progress = iter

    @cached_property
    def _parameters(self) -> frozenset[str]:
        """Names of the arguments of the model's forward."""
        return frozenset(inspect.signature(self.model.forward).parameters)

    @property
    def end(self) -> int:
        """How many tokens have to be read for the last score."""
        return self.positions[-1] + 1

    def score(self, logits: torch.Tensor, positions: list[int]) -> torch.Tensor:
        """Scores [positions] from logits [positions, vocabulary]."""
        targets = self.ids[[position + 1 for position in positions]]
        return nn.functional.cross_entropy(logits.float(), targets, reduction="none")

    def forward(self, ids: torch.Tensor, last: int, cache: Any = None, **options: Any) -> torch.Tensor:
        """The logits of the last tokens alone: in a small model the output layer takes half the time.

        Args:
            ids: token ids, shape [rows, tokens].
            last: how many tokens logits are wanted for.
            cache: of transformers or ours; None: no cache.
            options: other arguments of the model's forward.

        Returns:
            Logits, shape [rows, last, vocabulary].
        """
        if cache is not None:
            options[next(name for name in _CACHE_ARGUMENTS if name in self._parameters)] = cache
        if "logits_to_keep" in self._parameters:
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
    for position in reading.progress(range(window, reading.end)):
        wanted = position in reading.positions
        logits = reading.forward(reading.ids[None, position : position + 1], int(wanted), cache)
        if wanted:
            scores.append(reading.score(logits[0], [position]))
    return torch.cat(scores)


def recomputed(reading: Reading, bos: int | None = None) -> torch.Tensor:
    """Scores [positions] of a separate forward without cache over the newest W tokens, for each position: slow, exact.

    Args:
        reading: what is read.
        bos: token that replaces the oldest one of each window, for a model whose texts always begin with it.
    """
    scores: list[torch.Tensor] = []
    for start in reading.progress(range(0, len(reading.positions), _WINDOWS_AT_ONCE)):
        chunk = list(reading.positions[start : start + _WINDOWS_AT_ONCE])
        windows = torch.stack([reading.ids[p + 1 - reading.window_length : p + 1] for p in chunk])  # [chunk, W]
        if bos is not None:
            windows[:, 0] = bos
        logits = reading.forward(windows, 1, use_cache=False)
        scores.append(reading.score(logits[:, 0], chunk))
    return torch.cat(scores)


def without_new_positions(reading: Reading, num_sink_tokens: int) -> torch.Tensor:
    """Scores [positions] where a token sees the same tokens as in a `SinkCache`, but at their positions in the text.

    So the distance to the sinks grows. No key is re-rotated, so a `DynamicCache` of the whole text with a mask does it.
    """
    from transformers import DynamicCache

    cache, scores = DynamicCache(), []
    for start in reading.progress(range(0, reading.end, reading.window_length)):
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
