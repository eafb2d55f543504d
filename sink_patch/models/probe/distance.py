"""Whether attention knows only the distance between tokens: what two forwards of one token cannot show."""

from __future__ import annotations

import torch
from torch import nn

from sink_patch.errors import UnsupportedModelError
from sink_patch.models.entries import decoder_of
from sink_patch.models.probe.readings import LONGEST_DELTA, no_trace, probe_tokens, tolerance


def check_distance_only(model: nn.Module, max_position: int) -> None:
    """Compare the states of a short text at two places of the context, without a cache.

    Args:
        model: takes `position_ids`.
        max_position: the largest position that may be given to the model.

    Raises:
        UnsupportedModelError: they differ, so attention depends on more than distance.
    """
    token_ids = probe_tokens(model).T  # [1, tokens]
    length = token_ids.shape[1]
    shift = min(LONGEST_DELTA, max_position - length)
    near, far = (_hidden(model, token_ids, start) for start in (0, shift))  # [1, tokens, dim]
    found = ((near - far).norm() / near.norm()).item()
    allowed = 4 * tolerance(near.dtype)
    if not found <= allowed:  # a NaN does not pass either
        raise UnsupportedModelError(
            f"{type(model).__name__} gives other states for the same text at another place (off by {found:.2g}): its "
            "attention depends on more than distance, so a stream whose positions are set back would be wrong. Use "
            "another cache_implementation."
        )


def _hidden(model: nn.Module, token_ids: torch.Tensor, start: int) -> torch.Tensor:
    """Last hidden states [1, tokens, dim] of tokens [1, tokens] from a position on, without a cache."""
    position_ids = torch.arange(start, start + token_ids.shape[1], device=token_ids.device)[None, :]  # [1, tokens]
    with no_trace(model):
        hidden: torch.Tensor = decoder_of(model)(input_ids=token_ids, position_ids=position_ids, use_cache=False)[0]
    return hidden
