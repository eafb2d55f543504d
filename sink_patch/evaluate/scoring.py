"""Ways to read a long text with a window of W tokens, scored on the same positions.

A score is the negative log-likelihood, in nats, of token p + 1 after the model has read token p, for chosen positions p.
All ways see W tokens at such a position, token p counted in, so the figures can be compared one by one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

import sink_patch

Progress = Callable[[int, int], None]  # (tokens or positions done, of how many)

_WINDOWS_AT_ONCE = 4


def streamed(
    model: nn.Module,
    ids: torch.Tensor,
    positions: range,
    window_length: int,
    num_sink_tokens: int,
    progress: Progress,
) -> torch.Tensor:
    """One pass with a `SinkCache`: the first window in one forward, the rest token by token.

    Args:
        ids: token ids, shape [tokens].
        positions: rising, from `window_length` on; the last one below tokens - 1.

    Returns:
        Scores, shape [positions].
    """
    cache = sink_patch.SinkCache(window_length, num_sink_tokens, model=model)
    score_at, scores = set(positions), []
    model(ids[None, :window_length], past_key_values=cache, **_logits_of_last(model, 1))
    for position in range(window_length, positions[-1] + 1):
        wanted = position in score_at
        step = ids[None, position : position + 1]
        output = model(step, past_key_values=cache, **_logits_of_last(model, int(wanted)))
        if wanted:
            scores.append(_score(output.logits[:, -1], ids[position + 1 : position + 2]))
        progress(position + 1, positions[-1] + 1)
    return torch.cat(scores)


def recomputed(
    model: nn.Module, ids: torch.Tensor, positions: range, window_length: int, bos: int | None, progress: Progress
) -> torch.Tensor:
    """A forward without cache over the newest W tokens, for each position anew: exact, and W times the work.

    Args:
        bos: token that stands first in each window, in the place of the oldest one, for models that need it; or None.

    Returns:
        Scores, shape [positions].
    """
    scores: list[torch.Tensor] = []
    for chunk in _batches(positions, _WINDOWS_AT_ONCE):
        windows = torch.stack([ids[position + 1 - window_length : position + 1] for position in chunk])  # [chunk, W]
        if bos is not None:
            windows[:, 0] = bos
        output = model(windows, use_cache=False, **_logits_of_last(model, 1))
        scores.append(_score(output.logits[:, -1], ids[[position + 1 for position in chunk]]))
        progress(sum(map(len, scores)), len(positions))
    return torch.cat(scores)


def without_new_positions(
    model: nn.Module,
    ids: torch.Tensor,
    positions: range,
    window_length: int,
    num_sink_tokens: int,
    progress: Progress,
) -> torch.Tensor:
    """The same tokens seen as with a `SinkCache`, but at their places in the text: sinks fall ever farther behind.

    Nothing is re-rotated then, so a mask over one long plain cache says it all, W tokens a forward.

    Returns:
        Scores, shape [positions].
    """
    from transformers import DynamicCache

    cache, scores = DynamicCache(), []
    end = positions[-1] + 1
    for start in range(0, end, window_length):
        stop = min(start + window_length, end)
        scored = [position for position in positions if start <= position < stop]
        mask = _sink_mask(start, stop, window_length, num_sink_tokens, model.dtype)  # type: ignore[arg-type]
        output = model(
            ids[None, start:stop],
            past_key_values=cache,
            attention_mask=mask,
            position_ids=torch.arange(start, stop)[None],
            **_logits_of_last(model, stop - start),
        )
        if scored:
            rows = [position - stop for position in scored]  # from the end
            scores.append(_score(output.logits[0, rows], ids[[position + 1 for position in scored]]))
        progress(stop, end)
    return torch.cat(scores)


def _sink_mask(start: int, stop: int, window_length: int, num_sink_tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """Additive mask, shape [1, 1, stop - start, stop], that shows query i the sinks and the newest others up to i."""
    query = torch.arange(start, stop)[:, None]
    key = torch.arange(stop)[None, :]
    recent = (key < num_sink_tokens) | (query - key < window_length - num_sink_tokens)
    visible = (key <= query) & (recent | (query < window_length))
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)[None, None]


def _score(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Logits [rows, vocabulary] and ids [rows] to scores [rows]."""
    return nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def _batches(positions: range, size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(positions), size):
        yield positions[start : start + size]


def _logits_of_last(model: nn.Module, count: int) -> dict[str, Any]:
    """Have the model compute logits for the last tokens alone: the vocabulary is half the work of a small model."""
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return {}
    return {"logits_to_keep": count if count else torch.empty(0, dtype=torch.long)}
