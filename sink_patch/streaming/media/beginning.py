"""A forward begins that may bring images: what is noted of them, and what the model receives instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sink_patch.models.families.media import media_tokens
from sink_patch.streaming.inputs import Call
from sink_patch.streaming.media.coordinates import Coordinates
from sink_patch.streaming.media.given import TYPES, has_coordinates, sees_both_ways
from sink_patch.streaming.media.images import digests_by_row, images_among


def replaced_for_images(
    coordinates: Coordinates,
    module: nn.Module,
    named: Mapping[str, Any],
    inputs: torch.Tensor,
    read: int,
    call: Call | None,
    *,
    has_images: bool,
) -> dict[str, torch.Tensor | None]:
    """What a model that may see receives instead, in a forward with images and in those behind it.

    Args:
        coordinates: of the forward.
        named: its arguments.
        inputs: of it, ids [rows, columns] where it has images.
        read: columns that the cache has read before.
        call: of `generate`, in which it is.
    """
    if has_images:
        coordinates.columns = inputs.shape[1]
        brought = _brought(module, named, inputs, call)
        coordinates.look_for(inputs, media_tokens(module.config), brought, later=read > 0)
        if has_coordinates(module) and read:
            told = named if call is None else {**call.media, **named}
            coordinates.make(module, inputs, named.get("attention_mask"), told)
            return {}
        if has_coordinates(module):
            return {"position_ids": coordinates.expect(named.get("position_ids"))}
    types = [name for name in TYPES if named.get(name) is not None] if read else ()
    if types and sees_both_ways(module):  # by columns of the stream, of which some have left; here is text alone
        return dict.fromkeys(types)
    return {}


def with_mask(
    module: nn.Module, replaced: Mapping[str, torch.Tensor | None], inputs: torch.Tensor
) -> dict[str, torch.Tensor | None]:
    """What a model receives with images: also a mask where it needs none, as some make no positions without one.

    Args:
        replaced: what it would receive; its mask is None where all columns are seen.
        inputs: ids of the forward, the first one of a stream, [rows, columns].
    """
    if not has_coordinates(module) or replaced.get("attention_mask") is not None:
        return dict(replaced)
    return {**replaced, "attention_mask": torch.ones_like(inputs)}


def _brought(
    module: nn.Module, named: Mapping[str, Any], inputs: torch.Tensor, call: Call | None
) -> Sequence[tuple[str, ...]]:
    if call is not None:  # in which encoders may have run before
        return call.take_images()
    return digests_by_row(images_among(module, named), inputs, module.config)
