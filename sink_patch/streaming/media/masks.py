"""Masks of images that see themselves in both directions: made by the model's own maker, over what the cache shows.

Models make them of the types of all columns (`token_type_ids`), from the first one of the text on. What a forward sees
of the text before it is what the cache holds, in order, and belongs to no image of this forward. Two kept columns, and
an image in three of four new ones:

    types     0 0 | 0 1 1 1
    column 2  x x | x . . .
    column 3  x x | x x x x
    column 4  x x | x x x x
    column 5  x x | x x x x
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sink_patch.compat.models import SLIDING, TYPES
from sink_patch.errors import UnsupportedGenerationError
from sink_patch.models.families.masks import masks_of
from sink_patch.models.families.media import PROMPT, media_of
from sink_patch.streaming.steps.step import Step


class Masks:
    """Of the forward in progress: `are_due` until its decoder is called, where there are such images in it."""

    def __init__(self) -> None:
        self.are_due = False
        self._types: torch.Tensor | None = None  # [rows, columns]

    def expect(self, types: torch.Tensor | None) -> None:
        """The decoder will be called for columns of these types, [rows, columns]; None: the model was told of none."""
        self.are_due, self._types = True, types

    def made(self, model: nn.Module, decoder: Mapping[str, Any], cache: Any, step: Step | None) -> dict[str, Any]:
        """The decoder is called: the mask that it is to be given, for each kind of its layers where there are several.

        Args:
            model: whose decoder it is.
            decoder: arguments of it, with embeddings [rows, columns, hidden].
            cache: of the forward.
            step: of the forward.

        Raises:
            UnsupportedGenerationError: in this transformers images would see something else than in a first prompt.
        """
        maker, embeddings = masks_of(model), decoder["inputs_embeds"]
        if not self.are_due or maker is None or step is None:
            return {}
        self.are_due = False
        past, device = step.past_columns(), embeddings.device
        types = None if self._types is None else self._types.to(device)
        found = maker(
            embeddings,
            None if types is None else _from_the_first(model, types, past),
            cache,
            attention_mask=step.attention_mask(),
            position_ids=decoder.get("position_ids"),
            cache_position=step.mask_coordinates(),
        )
        columns = torch.arange(step.columns, device=device)
        real = columns >= step.columns - torch.tensor([[plan.new] for plan in step.plans], device=device)
        alone = maker(
            embeddings, types, None, attention_mask=real.long(), position_ids=None, cache_position=columns
        )  # in a text that begins here
        if not _fit(found, cache, step) or not _are_alike(found, alone, real):
            raise UnsupportedGenerationError(
                "Images that see themselves in both directions were given to a SinkCache in a later turn or by "
                "pieces, and in this transformers the model makes other masks for them there than in a first "
                "prompt. Pass all that the processor returns (token_type_ids among it); or upgrade transformers, "
                "or give the whole text to a new SinkCache at once."
            )
        return {"attention_mask": found}

    def check_made(self) -> None:
        """Refuse a forward that has ended without them.

        Raises:
            UnsupportedGenerationError: as it says.
        """
        if self.are_due:
            raise UnsupportedGenerationError(
                "Images that see themselves in both directions went through a compiled forward behind others with a "
                "SinkCache, where their masks cannot be made. Compile single tokens alone: "
                "generate(..., compile_config=...) does."
            )


def types_of(named: Mapping[str, Any], columns: int) -> torch.Tensor | None:
    """The types of the columns of a forward among its arguments, [rows, columns]; None: there are none."""
    given = [named[name] for name in TYPES if isinstance(named.get(name), torch.Tensor)]
    return given[0][:, -columns:] if given else None  # some versions give those of a whole history


def _from_the_first(model: nn.Module, types: torch.Tensor, past: int) -> torch.Tensor:
    """Types of new columns, and before them of so many that are no image, [rows, past + columns]."""
    media = media_of(model.config)
    none = 1 if media is not None and media.both_ways == PROMPT else 0  # there, 0 is the prompt and 1 is the answer
    return torch.cat((types.new_full((types.shape[0], past), none), types), dim=1)


def _fit(found: Any, cache: Any, step: Step) -> bool:
    """Whether masks of kinds of layers are as long as what these see: some versions take one length for all."""
    seen = {
        is_sliding: step.layouts[layer.kind_index].length
        for is_sliding, layer in zip(cache.is_sliding, cache.layers, strict=True)
        if hasattr(layer, "kind_index")
    }
    masks = found.items() if isinstance(found, dict) else ()
    lengths = [(mask.shape[-1], seen.get(kind == SLIDING)) for kind, mask in masks if isinstance(mask, torch.Tensor)]
    return all(wanted in (None, length) for length, wanted in lengths)


def _are_alike(found: Any, alone: Any, real: torch.Tensor) -> bool:
    """Whether the new columns see of what comes what they see in a text that begins with them.

    Args:
        found, alone: a mask [rows, 1, columns, ...], or a dict of them; with the cache, and without.
        real: which columns are no padding, [rows, columns].
    """
    pairs = [(found[kind], alone[kind]) for kind in found] if isinstance(found, dict) else [(found, alone)]
    pairs = [pair for pair in pairs if all(mask is None or isinstance(mask, torch.Tensor) for mask in pair)]
    ahead = (real[:, None, :, None] & real[:, None, None, :]).triu(1)  # [rows, 1, columns, columns]
    return all(torch.equal(_visible(one, ahead) & ahead, _visible(other, ahead) & ahead) for one, other in pairs)


def _visible(mask: torch.Tensor | None, ahead: torch.Tensor) -> torch.Tensor:
    """What new columns see of new columns, [rows, 1, columns, columns]; of no mask what comes is not seen."""
    if mask is None or mask.ndim != 4:
        return torch.zeros_like(ahead)
    mask = mask[..., -ahead.shape[-1] :]
    return mask if mask.dtype == torch.bool else mask == 0
