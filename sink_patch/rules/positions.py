"""Positions of the caller's own: taken where they are those that the cache counts, and refused else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sink_patch.errors import SinkArgumentError
from sink_patch.rules.padding import new_tokens


def check_of_forward(position_ids: Any, attention_mask: Any, seen: Sequence[int], fed: int, columns: int) -> None:
    """Refuse positions given to a forward that are not those of its tokens in the stream.

    Args:
        position_ids: [rows or 1, columns], or more of such for several coordinates (M-RoPE).
        attention_mask, seen, fed, columns: as for `new_tokens`.

    Raises:
        SinkArgumentError: as it says; or the mask does not fit.
    """
    new = torch.tensor(new_tokens(attention_mask, seen, fed, columns), device="cpu")[:, None]  # [rows, 1]
    column = torch.arange(columns, device="cpu")[None, :]  # [1, columns]
    behind = column - (columns - new)  # [rows, columns]: how many new tokens come before
    _check(position_ids, torch.tensor(seen, device="cpu")[:, None] + behind, behind >= 0)


def check_of_call(position_ids: Any, mask: torch.Tensor, seen: Sequence[int], fed: int) -> torch.Tensor:
    """Refuse positions given to `generate` that are not those of the newest columns in the stream.

    Args:
        position_ids: [rows or 1, columns], or more of such; for all columns of the mask, or for the last ones.
        mask: [rows, columns], over the whole stream, or over new columns that are no more than `fed`.
        seen: real tokens of each row of the cache.
        fed: columns so far.

    Returns:
        What the cache counts, for all columns of the mask; int64 [rows, columns], 0 for padding at the start.

    Raises:
        SinkArgumentError: as it says.
    """
    real = mask.cpu() != 0
    counted = real.long().cumsum(-1) - 1
    if real.shape[-1] <= fed and len(seen) == real.shape[0]:
        counted += torch.tensor(seen, device="cpu")[:, None]
    given = position_ids.shape[-1] if isinstance(position_ids, torch.Tensor) and position_ids.ndim else 0
    skipped = max(0, real.shape[-1] - given)
    _check(position_ids, counted[:, skipped:], real[:, skipped:])
    return counted.clamp(min=0)


def _check(position_ids: Any, counted: torch.Tensor, real: torch.Tensor) -> None:
    """Compare with [rows, columns]; positions of padding do not matter."""
    if not isinstance(position_ids, torch.Tensor):
        raise SinkArgumentError(
            f"position_ids is a {type(position_ids).__name__}. Leave it out: the SinkCache counts positions by itself."
        )
    rows, columns = counted.shape
    given = position_ids.detach().cpu()
    if given.ndim < 1 or given.shape[-1] != columns or (given.ndim > 1 and given.shape[-2] not in (1, rows)):
        raise SinkArgumentError(
            f"position_ids has shape {list(given.shape)}, but {columns} columns of {rows} rows are fed. Leave it out: "
            "the SinkCache counts positions by itself."
        )
    if bool(((given != counted) & real).any()):
        raise SinkArgumentError(
            f"position_ids {_excerpt(given)} were given with a SinkCache, which counts the tokens of each row from 0 "
            f"on, padding left out, and gives the model positions within its window: these are at {_excerpt(counted)}. "
            "Leave them out, or use another cache."
        )


def _excerpt(positions: torch.Tensor) -> str:
    row = positions.reshape(-1, positions.shape[-1])[-1].tolist()
    return str(row) if len(row) <= 6 else f"[{row[0]}, {row[1]}, {row[2]}, ..., {row[-2]}, {row[-1]}]"
