"""How many real tokens a forward brings to each row, from the 2D attention mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sink_patch.errors import SinkArgumentError


def new_tokens(attention_mask: Any, seen: Sequence[int], fed: int, columns: int) -> list[int]:
    """Real tokens among the new columns, row by row.

    Args:
        attention_mask: None (all real), or a tensor [rows, fed + columns] or [rows, columns], non-zero for real tokens.
        seen: real tokens of each row so far.
        fed: columns so far.
        columns: columns of this forward.

    Raises:
        SinkArgumentError: a mask of another kind or shape, padding to the right of a token, or a mask that calls other
            tokens real than those that were. A row of padding only is none: the piece of a long prompt may be one.
    """
    rows = len(seen)
    if attention_mask is None:
        return [columns] * rows
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        raise SinkArgumentError(
            "attention_mask must be two-dimensional with a SinkCache, which makes the attention's own mask from it. "
            f"Got {_describe(attention_mask)}."
        )
    if attention_mask.shape[0] != rows or attention_mask.shape[1] not in (fed + columns, columns):
        raise SinkArgumentError(
            f"attention_mask has shape {list(attention_mask.shape)}, but the stream has {rows} rows and, with this "
            f"forward, {fed + columns} columns. Give a mask over all of them, or none."
        )
    real = attention_mask[:, -columns:] != 0  # [rows, columns]
    if bool(real.all()) and columns == 1:
        return [1] * rows
    counts: list[int] = real.sum(dim=1).tolist()
    check_left_padded(real)
    if attention_mask.shape[1] > columns and (attention_mask[:, :fed] != 0).sum(dim=1).tolist() != list(seen):
        raise SinkArgumentError(
            "attention_mask calls other tokens of the past real than those that were fed: the stream has "
            f"{list(seen)} in its rows. Pass the mask that was used before, extended by the new columns."
        )
    return counts


def tokens_hidden(attention_mask: torch.Tensor, seen: Sequence[int], fed: int) -> list[int]:
    """How many of the newest tokens of each row a mask calls padding.

    Rows of a batch end at different times, and `generate` feeds padding to those that have ended until all have. In the
    next turn a mask tells what that was. 0 where the mask does not fit what was fed: `new_tokens` says so.

    Args:
        attention_mask: [rows, columns of the stream], non-zero for real tokens.
        seen: tokens of each row so far.
        fed: columns so far.
    """
    real = attention_mask[:, :fed].cpu() != 0  # [rows, fed]
    counts = real.sum(dim=1)
    behind = real.flip(1).long().cumsum(dim=1).eq(0).sum(dim=1)  # columns behind the last real one of each row
    taken = torch.tensor(list(seen), device="cpu") - counts
    return taken.where((taken > 0) & (taken <= behind), 0).tolist()


def _describe(attention_mask: Any) -> str:
    if isinstance(attention_mask, torch.Tensor):
        return f"a tensor of shape {list(attention_mask.shape)}"
    return f"a {type(attention_mask).__name__}"


def is_left_padded(real: torch.Tensor) -> bool:
    """Whether no real token [rows, columns] has padding behind it."""
    return not bool((real[:, :-1] & ~real[:, 1:]).any())


def check_left_padded(real: torch.Tensor, *, to_the_end: bool = False) -> None:
    """Refuse real tokens [rows, columns] that have padding behind them.

    Args:
        real: which of the columns hold tokens.
        to_the_end: whether the last of the columns must be one in each row.

    Raises:
        SinkArgumentError: padding to the right of a token.
    """
    if not is_left_padded(real) or (to_the_end and not bool(real[:, -1].all())):
        raise SinkArgumentError(
            "attention_mask has padding to the right of a token. Pad to the left: tokenizer.padding_side = 'left'."
        )
