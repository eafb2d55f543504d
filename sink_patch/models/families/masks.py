"""What makes the masks of a model in which images see themselves in both directions: its own maker."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sink_patch.compat.models import CACHE_NAMES, TYPES
from sink_patch.models.families.media import media_of

Maker = Callable[..., Any]
"""Takes embeddings [rows, columns, dim]; types of all mask coordinates up to the last one, [rows, ...], or None; a
cache or None; and by name what else masks are made of. Returns a mask, or a dict of them by types of layers."""


def masks_of(model: nn.Module) -> Maker | None:
    """What makes the masks of a model; None: nothing can, or they are those of any text.

    It is the method that `generate` calls where it compiles.
    """
    media = media_of(getattr(model, "config", None))
    method: Maker | None = getattr(type(model), "create_masks_for_generate", None)
    names = frozenset() if method is None else frozenset(inspect.signature(method).parameters)
    types_name = next((name for name in TYPES if name in names), None)
    if media is None or not media.both_ways or method is None or types_name is None:
        return None
    by_its_own: Maker = method

    def made(embeddings: torch.Tensor, types: torch.Tensor | None, cache: Any, **others: Any) -> Any:
        given = {**others, **dict.fromkeys(("inputs_embeds", "input_embeds"), embeddings)}
        given |= {**dict.fromkeys(CACHE_NAMES, cache), types_name: types, "is_first_iteration": True}
        return by_its_own(model.config, **{name: value for name, value in given.items() if name in names})

    return _by_blocks(model) if media.by_blocks else made


def _by_blocks(model: Any) -> Maker:
    """That of transformers for all models."""
    from transformers.masking_utils import create_masks_for_generate

    config, names = model.config.get_text_config(), inspect.signature(create_masks_for_generate).parameters

    def made(embeddings: torch.Tensor, types: torch.Tensor | None, cache: Any, **others: Any) -> Any:
        given = {**others, "inputs_embeds": embeddings, **dict.fromkeys(CACHE_NAMES, cache)}
        if types is not None and config.use_bidirectional_attention == "vision":  # small models have causal masks
            given["block_sequence_ids"] = _blocks(types)
        return create_masks_for_generate(config, **{name: value for name, value in given.items() if name in names})

    return made


def _blocks(types: torch.Tensor) -> torch.Tensor:
    """Numbers of images, of types [rows, ...], which are 1 in images and 2 in videos; -1 of all else."""
    of_image = (types == 1) | (types == 2)
    before = torch.nn.functional.pad(of_image, (1, 0))[:, :-1]
    return torch.where(of_image, (of_image & ~before).cumsum(dim=1) - 1, -1)
