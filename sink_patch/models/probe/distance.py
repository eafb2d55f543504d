"""Whether attention knows only the distance between tokens: what two forwards of one token cannot show."""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import nn

from sink_patch.errors import UnsupportedModelError
from sink_patch.models.probe.calls import NUM_TOKENS, probe_tokens, run
from sink_patch.models.probe.readings import LONGEST_DELTA, tolerance


def check_distance_only(model: nn.Module, max_position: int, dtypes: Set[torch.dtype], rows: int = NUM_TOKENS) -> None:
    """Compare what comes out for a short text at two places of the context, without a cache.

    Args:
        model: takes `position_ids`.
        max_position: the largest position that may be given to the model.
        dtypes: of what it caches: its states are as exact as those, also where its logits are in float32.
        rows: of each forward, see `readings.read`; all bring the same text.

    Raises:
        UnsupportedModelError: they differ, so attention depends on more than distance.
    """
    token_ids = probe_tokens(model).T.expand(rows, -1)  # [rows, tokens]
    length = token_ids.shape[1]
    shift = min(LONGEST_DELTA, max_position - length)
    near, far = (_output(model, token_ids, start) for start in (0, shift))  # [rows, tokens, ...]
    found = ((near - far).norm() / near.norm()).item()
    allowed = 4 * max(map(tolerance, {near.dtype, *dtypes}))
    if not found <= allowed:  # a NaN does not pass either
        raise UnsupportedModelError(
            f"{type(model).__name__} gives other states for the same text at another place (off by {found:.2g}): its "
            "attention depends on more than distance, so a stream whose positions are set back would be wrong. Use "
            "another cache_implementation."
        )


def _output(model: nn.Module, token_ids: torch.Tensor, start: int) -> torch.Tensor:
    """Logits (or last states) [rows, tokens, ...] of tokens [rows, tokens] from a position on, without a cache."""
    position_ids = torch.arange(start, start + token_ids.shape[1], device=token_ids.device)[None, :]  # [1, tokens]
    output: torch.Tensor = run(model, token_ids, position_ids)[0]
    return output
