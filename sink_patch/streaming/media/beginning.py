"""A forward begins that may bring images: what is noted of them, and what the model receives instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sink_patch.compat.models import TYPES
from sink_patch.errors import UnsupportedGenerationError
from sink_patch.models.families.media import media_of, media_tokens
from sink_patch.rules.rows import Row
from sink_patch.streaming.inputs import Call, accepted
from sink_patch.streaming.media.coordinates import Coordinates
from sink_patch.streaming.media.cut import Cut, Whole
from sink_patch.streaming.media.given import has_coordinates, sees_both_ways
from sink_patch.streaming.media.images import digests_by_row, images_among
from sink_patch.streaming.media.masks import types_of
from sink_patch.streaming.media.placing import made_positions

_TYPES = frozenset(TYPES)


def replaced_for_images(
    coordinates: Coordinates,
    module: nn.Module,
    named: Mapping[str, Any],
    inputs: torch.Tensor,
    rows: Sequence[Row],
    call: Call | None,
    *,
    has_images: bool,
) -> dict[str, torch.Tensor | None]:
    """What a model that may see receives instead, in a forward with images and in those behind it.

    Args:
        coordinates: of the forward.
        named: its arguments.
        inputs: of it, ids [rows, columns] where it has images.
        rows: of the cache; none: it has read nothing.
        call: of `generate`, in which it is.
    """
    types: dict[str, torch.Tensor | None] = {}
    if not has_images and _TYPES.isdisjoint(named):
        return types
    both_ways = rows and sees_both_ways(module)
    if both_ways:  # by columns of the stream, of which some have left
        types = dict.fromkeys(name for name in TYPES if named.get(name) is not None)
    if not has_images:
        return types
    coordinates.columns = inputs.shape[1]
    tokens = media_tokens(module.config)
    coordinates.look_for(inputs, tokens, _brought(module, named, inputs, call), later=bool(rows))
    told = _told(named, call)
    if has_coordinates(module) and rows:
        made = made_positions(module, inputs, named.get("attention_mask"), told)
        coordinates.go_on(made, starts_of(rows))
    elif has_coordinates(module):
        return {"position_ids": coordinates.expect(named.get("position_ids"))}
    if both_ways and inputs.shape[1] > 1:
        coordinates.masks.expect(types_of(told, inputs.shape[1]))
    return types


def begun_by_pieces(
    cut: Cut, module: nn.Module, named: Mapping[str, Any], rows: Sequence[Row], call: Call
) -> dict[str, Any]:
    """What a model receives in the forward of a whole prompt that goes in by pieces, which is none over the cache.

    Args:
        named: arguments of it.
        rows: of the cache; none: it has read nothing.
    """
    ids, mask, told = named["input_ids"], named.get("attention_mask"), _told(named, call)
    media, replaced = media_of(module.config), dict[str, Any]()
    both_ways = "" if media is None else media.both_ways
    cut.whole = Whole(
        ids,
        media_tokens(module.config),
        bool(rows),
        mask,
        types_of(told, ids.shape[1]) if both_ways else None,
        both_ways,
        (starts_of(rows) or [0] * len(ids)) if has_coordinates(module) else (),
    )
    if has_coordinates(module):
        given = named.get("position_ids")
        given = given if isinstance(given, torch.Tensor) and given.ndim > 2 else None  # the model makes them
        replaced["position_ids"] = made_positions(module, ids, mask, told) if rows else given
        replaced["attention_mask"] = torch.ones_like(ids) if mask is None and not rows else mask
    if both_ways:
        replaced["attention_mask"] = cut.whole.prepared_mask
    return {**named, **accepted(module, replaced, named)}


def next_piece(
    coordinates: Coordinates, decoder: nn.Module, named: dict[str, Any], call: Call, cut: Cut, whole: Whole
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The decoder is called for a prompt that goes in by pieces.

    Returns:
        The ids of the columns that are to go in now, [rows, columns], and the arguments of the decoder for them.
    """
    piece = cut.feed_ahead(decoder, named, whole)
    coordinates.look_for(piece.ids, whole.tokens, *call.images_of_piece(len(piece.ids)))
    if whole.starts:
        made = piece.given["position_ids"][-3:].expand(3, *piece.ids.shape)
        coordinates.go_on(made, whole.starts, by_piece=True, following=piece.following)
    if whole.both_ways and piece.ids.shape[1] > 1:
        coordinates.masks.expect(piece.types)
    return piece.ids, piece.given


def starts_of(rows: Sequence[Row]) -> list[int]:
    """At which positions a text begins behind the rows, as if no clock had ever been set back."""
    return [row.seen - row.lag for row in rows]


def check_decoder(
    coordinates: Coordinates, module: nn.Module, position_ids: Any, *, runs: bool, is_model: bool
) -> None:
    """A decoder is called in a forward that its model has not begun, or had begun with other columns.

    Args:
        runs: whether the model has begun a forward.
        is_model: whether this is the model itself.

    Raises:
        UnsupportedGenerationError: images have made more columns; or coordinates differ, as there are images that the
            hooks of the model have not seen (PEFT calls past those), and nothing tells where they end.
    """
    if runs and coordinates.columns is not None:
        raise UnsupportedGenerationError(
            f"{type(module).__name__} was called with other columns than the {coordinates.columns} of a prompt "
            "with images or sounds: the prompt must hold a token for each column of them, as processors write it. "
            "Update the processor, or use another cache."
        )
    if is_model or getattr(position_ids, "ndim", 0) < 3:
        return
    if not bool((position_ids[-3:] == position_ids[-1:]).all()):
        raise UnsupportedGenerationError(
            f"{type(module).__name__} was called with positions of several coordinates, as for images, and not by the "
            "model that a SinkCache is bound to. Call that model itself, or use another cache."
        )


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


def _told(named: Mapping[str, Any], call: Call | None) -> Mapping[str, Any]:
    """All that a forward and its call tell of images: some versions hand a part of it to encoders alone."""
    return {**({} if call is None else call.media), **{name: one for name, one in named.items() if one is not None}}
