"""The one-layer oracle: the right logits of a forward, by a fresh forward without a cache.

In a model with one layer, a key depends on its own token alone. So a forward with a cache must give the same logits as
a forward over the tokens that it sees by the four rules (sink_patch/README.md).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from transformers import PreTrainedModel

from sink_patch import SinkCache


def visible_tokens(stream: torch.Tensor, seen: int, new: int, window_length: int, num_sink_tokens: int) -> torch.Tensor:
    """The tokens [rows, visible] that a forward of `new` tokens after `seen` ones sees, by the four rules."""
    total = seen + new
    if total <= window_length or seen == 0:  # rules 1 and 2
        return stream[:, :total]
    if new <= window_length - num_sink_tokens:  # rule 3
        recent = window_length - num_sink_tokens
        return torch.cat((stream[:, :num_sink_tokens], stream[:, total - recent : total]), dim=1)
    return torch.cat((stream[:, : min(seen, num_sink_tokens)], stream[:, seen:total]), dim=1)  # rule 4


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference to norm of `wanted`; infinite if it is NaN, which `max` over errors would ignore."""
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
        local_window: the layer's own sliding window, if it is shorter than the cache's: then it has no sinks.
        cache: None: a new one.
        use_cache: whether the fresh forwards have a cache, which some layers need to share keys (Gemma 3n).
    """
    cache = SinkCache(window_length, num_sink_tokens, model=model) if cache is None else cache
    found, visible, seen = [], [], 0
    for new in schedule:
        found.append(model(stream[:, seen : seen + new], past_key_values=cache).logits[:, -1])
        if local_window is not None:
            visible.append(stream[:, max(0, seen + new - local_window) : seen + new])
        else:
            visible.append(visible_tokens(stream, seen, new, window_length, num_sink_tokens))
        seen += new
    wanted = last_logits(model, visible, use_cache=use_cache)
    return max((relative_error(*pair) for pair in zip(found, wanted, strict=True)), default=0.0)


@torch.no_grad()
def last_logits(
    model: PreTrainedModel, texts: Sequence[torch.Tensor], *, use_cache: bool = False
) -> list[torch.Tensor]:
    """Last logits [rows, vocabulary] of fresh forwards over texts [rows, length]; those of one length in one batch."""
    wanted: dict[int, torch.Tensor] = {}
    of_length: dict[int, list[int]] = defaultdict(list)
    for index, text in enumerate(texts):
        of_length[text.shape[1]].append(index)
    for indices in of_length.values():
        batch = torch.cat([texts[index] for index in indices])  # [texts * rows, length]
        logits = model(batch, use_cache=use_cache).logits[:, -1]
        wanted.update(zip(indices, logits.chunk(len(indices)), strict=True))
    return [wanted[index] for index in range(len(texts))]
