"""Which columns are those of images, and whether a model has put these in their place before it calls its decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sink_patch.errors import UnsupportedGenerationError


def of_images(ids: torch.Tensor, tokens: frozenset[int]) -> torch.Tensor:
    """Which columns stand for images, [rows, columns].

    Args:
        ids: [rows, columns].
        tokens: those that do, see `media_tokens`.
    """
    return torch.isin(ids, torch.tensor(sorted(tokens), dtype=ids.dtype, device=ids.device))


def check_in_place(decoder: nn.Module, ids: torch.Tensor, tokens: frozenset[int], inputs_embeds: Any) -> None:
    """Refuse a later turn whose images are left out: some versions put those of a first prompt in alone.

    Args:
        decoder: which is called now.
        ids: of the turn, [rows, columns].
        tokens: ids that stand for images.
        inputs_embeds: what the decoder is given, [rows, columns, dim]; None: ids, among which it puts images itself.

    Raises:
        UnsupportedGenerationError: where images should be, words are.
    """
    of_image = of_images(ids, tokens)
    if not isinstance(inputs_embeds, torch.Tensor) or not bool(of_image.any()):
        return
    table: Any = decoder
    words = table.get_input_embeddings()(ids)  # [rows, columns, dim]
    if bool((inputs_embeds == words)[of_image].all()):
        raise UnsupportedGenerationError(
            "Images were given in a later turn of a SinkCache, and in this transformers the model puts images into its "
            "first prompt alone. Upgrade transformers, or give the whole text to a new SinkCache."
        )
