"""The one-layer oracle (DESIGN.md, section 3): what a forward must give, by a fresh forward without a cache.

In a model with one layer a key depends on its own token alone, so the cache may be replaced by the tokens that it
stands for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from sink_patch import SinkCache


def visible_tokens(stream: torch.Tensor, seen: int, new: int, window_length: int, num_sink_tokens: int) -> torch.Tensor:
    """The tokens [rows, visible] that a forward of `new` tokens after `seen` ones stands for, by the four rules."""
    total = seen + new
    if total <= window_length or seen == 0:  # rules 1 and 2
        return stream[:, :total]
    if new <= window_length - num_sink_tokens:  # rule 3
        recent = window_length - num_sink_tokens
        return torch.cat((stream[:, :num_sink_tokens], stream[:, total - recent : total]), dim=1)
    return torch.cat((stream[:, : min(seen, num_sink_tokens)], stream[:, seen:total]), dim=1)  # rule 4


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Infinite where something is not a number, which a maximum over errors would pass over."""
    error = ((found - wanted).norm() / wanted.norm()).item()
    return math.inf if math.isnan(error) else error


@torch.no_grad()
def worst_error(
    model: PreTrainedModel,
    stream: torch.Tensor,
    schedule: Iterable[int],
    window_length: int,
    num_sink_tokens: int,
    *,
    local_window: int | None = None,
    cache: SinkCache | None = None,
    use_cache: bool = False,
) -> float:
    """Largest relative error of the last logits over a schedule of forwards.

    Args:
        use_cache: whether the fresh forwards have a cache, without which some layers do not share keys (Gemma 3n).
        local_window: the layer's own sliding window where it is shorter than the cache's: then it has no sinks.
    """
    cache = SinkCache(window_length, num_sink_tokens, model=model) if cache is None else cache
    worst, seen = 0.0, 0
    for new in schedule:
        found = model(stream[:, seen : seen + new], past_key_values=cache).logits[:, -1]
        if local_window is not None:
            standing_for = stream[:, max(0, seen + new - local_window) : seen + new]
        else:
            standing_for = visible_tokens(stream, seen, new, window_length, num_sink_tokens)
        worst = max(worst, relative_error(found, model(standing_for, use_cache=use_cache).logits[:, -1]))
        seen += new
    return worst
