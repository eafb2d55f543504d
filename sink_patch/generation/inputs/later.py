"""Images and sounds of a call of `generate`: those that its cache has read are left out before any encoder runs."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import nn

from sink_patch.cache.sink_cache import SinkCache
from sink_patch.compat.models import TYPES
from sink_patch.errors import HistoryMismatchError, UnsupportedGenerationError
from sink_patch.generation.inputs.brought import Brought, expands, note, noted_on
from sink_patch.models.entries import cache_argument
from sink_patch.models.families.media import media_tokens
from sink_patch.rules.columns import Columns
from sink_patch.rules.rows import Row
from sink_patch.streaming.bound import streams_of
from sink_patch.streaming.media.given import check_media, has_coordinates, media_among
from sink_patch.streaming.media.images import NUMBERS, OF_IMAGES, Images, digests_by_row, images_among, of_kind
from sink_patch.streaming.media.placing import of_images
from sink_patch.streaming.streams import Streams

_KNOWN = OF_IMAGES.union(TYPES, {"attention_mask", "position_ids", "cache_position", NUMBERS})
_ALONE = "Give the new tokens alone, with their images and an attention_mask over the whole stream."


def leave_out_read(model: nn.Module, generation_config: Any, model_kwargs: MutableMapping[str, Any]) -> None:
    """Of all images of a history leave those to the model that its cache has not read, and note which they are.

    Args:
        generation_config, model_kwargs: of the call, to be changed.

    Raises:
        UnsupportedGenerationError: what `check_media` raises of any turn; or it cannot be said which images are new.
        HistoryMismatchError: the first ones of a row are not those that it has read.
    """
    given, cache = media_among(model, model_kwargs), model_kwargs.get(cache_argument(model))
    if not given or getattr(generation_config, "is_assistant", None):
        return
    before = noted_on(generation_config)
    if before is not None and before.is_of([model_kwargs[name] for name in given]):
        return  # Janus prepares the config itself, and `generate` does it again
    check_media(model, model_kwargs, 0)
    images, new = images_among(model, model_kwargs), None
    if isinstance(cache, SinkCache) and cache.get_seq_length():
        images, new = None, _of_later_turn(model, images, streams_of(cache), generation_config, model_kwargs)
    media = {name: one for name, one in model_kwargs.items() if name in OF_IMAGES.union(TYPES) and one is not None}
    left = [model_kwargs[name] for name in media_among(model, model_kwargs)]
    note(generation_config, Brought(images, new or (), {} if new is None else media, left))


def _of_later_turn(
    model: nn.Module,
    images: Sequence[Images] | None,
    streams: Streams,
    generation_config: Any,
    model_kwargs: MutableMapping[str, Any],
) -> Sequence[tuple[str, ...]]:
    """Leave what was read out of the arguments; returns the digests of what is new, row by row."""
    given, ids, rows = media_among(model, model_kwargs), model_kwargs.get("input_ids"), streams.rows or ()
    if ids is None:
        raise UnsupportedGenerationError(
            f"{', '.join(given)} was given with a SinkCache that has read {streams.columns} columns, and ids that "
            "were not passed by name, which tell what is new. Call generate(input_ids=..., ...)."
        )
    columns = columns_of(ids, model_kwargs, streams.columns)
    _check_rows(model, generation_config, columns, len(ids), len(rows))
    if columns.is_history:
        new = _not_read(model, images, ids, rows, model_kwargs)
    else:
        new = digests_by_row(images, ids, model.config)
    _check_stand(model, ids[:, ids.shape[1] - columns.new :], given, has_images=any(new))
    if has_coordinates(model) and any(new):  # which transformers would make of all ids and the new images
        mask = torch.ones_like(ids) if model_kwargs.get("attention_mask") is None else model_kwargs["attention_mask"]
        model_kwargs["position_ids"] = (mask.long().cumsum(dim=-1) - 1).clamp(min=0)
    return new


def columns_of(ids: torch.Tensor, model_kwargs: Mapping[str, Any], read: int) -> Columns:
    """Which columns of a call are new, by its ids [rows, columns] and its mask."""
    mask = model_kwargs.get("attention_mask")
    return Columns.of_call(read, ids.shape[1], None if mask is None else mask.shape[-1])


def _check_rows(model: nn.Module, generation_config: Any, columns: Columns, given: int, held: int) -> None:
    """Refuse what does not tell which images are of which row."""
    if columns.is_history and given != held:
        raise UnsupportedGenerationError(
            f"All images of a history of {given} rows were given with a SinkCache that holds {held}, and it cannot be "
            f"said which of them it has read. {_ALONE}"
        )
    if has_coordinates(model) and expands(generation_config):
        raise UnsupportedGenerationError(
            f"Images were given in a later turn with num_beams or num_return_sequences, and {type(model).__name__} "
            "makes positions of several coordinates for them, of which each row would need its own. Use one of each."
        )


def check_is_text(model: nn.Module, ids: torch.Tensor) -> None:
    """Refuse ids [rows, columns] that stand for images where padding parts them from the rest of a turn.

    Raises:
        UnsupportedGenerationError: as it says.
    """
    if _stand_for_images(model, ids):
        raise UnsupportedGenerationError(
            f"The newest {ids.shape[1]} columns that a SinkCache has not read stand for images, and padding stands "
            "between them and what follows. Give them in a call or a forward of their own."
        )


def _not_read(
    model: nn.Module,
    images: Sequence[Images] | None,
    ids: torch.Tensor,
    rows: Sequence[Row],
    model_kwargs: MutableMapping[str, Any],
) -> list[tuple[str, ...]]:
    """Leave out what the rows have read; returns the digests of the others, row by row."""
    _check_told(ids, model_kwargs)
    new: list[tuple[str, ...]] = [()] * len(rows)
    for some in [None] if images is None else images:
        placed = None if some is None else some.in_rows(ids, model.config)
        if some is None or placed is None or not all(row.knows_images for row in rows):
            raise UnsupportedGenerationError(
                "All images of a history were given with a SinkCache that has read a part of it, and it cannot be said "
                "which of them it has read: the rows have images of different sizes, or some were read unseen. "
                f"{_ALONE}"
            )
        kept = list[int]()
        for number, (row, mine) in enumerate(zip(rows, placed, strict=True)):
            had = of_kind(row.images, some.kind)
            if [some.digests[image] for image in mine[: len(had)]] != had:
                raise HistoryMismatchError.other_images(f"row {number}", len(had), len(mine))
            kept += mine[len(had) :]
            new[number] += tuple(some.digests[image] for image in mine[len(had) :])
        for name, value in some.arguments(sorted(kept), len(rows)).items():
            model_kwargs[name] = value
            if value is None:  # a name is enough for some versions to run an encoder
                del model_kwargs[name]
    if NUMBERS in model_kwargs and any(new):
        model_kwargs[NUMBERS] = model_kwargs[NUMBERS].new_tensor([len(one) for one in new])  # [rows]
    elif NUMBERS in model_kwargs:
        del model_kwargs[NUMBERS]
    return new


def _check_told(ids: torch.Tensor, model_kwargs: Mapping[str, Any]) -> None:
    """Refuse tensors of which nobody knows what belongs to which image.

    Raises:
        UnsupportedGenerationError: as it says.
    """
    unknown = [
        name
        for name, value in model_kwargs.items()
        if isinstance(value, torch.Tensor) and value.ndim and name not in _KNOWN and value.shape[:2] != ids.shape
    ]
    if unknown:
        raise UnsupportedGenerationError(
            f"{', '.join(unknown)} was given with all images of a history and a SinkCache that has read a part of it, "
            f"and it is not known what of it belongs to which of them. {_ALONE}"
        )


def _check_stand(model: nn.Module, new: torch.Tensor, given: Sequence[str], *, has_images: bool) -> None:
    """Refuse new ids [rows, columns] that do not stand for the images that are new."""
    stand = _stand_for_images(model, new)
    if media_tokens(model.config) and stand != has_images:
        raise UnsupportedGenerationError(
            f"{', '.join(given)} was given with a SinkCache in a later turn, and of the {new.shape[1]} columns that "
            f"are new {'some stand' if stand else 'none stands'} for images, while {'some' if has_images else 'none'} "
            "of the images are new. Give the images of the whole history with all of its ids, as the processor makes "
            "them; or the new ones alone with the new ids."
        )


def _stand_for_images(model: nn.Module, ids: torch.Tensor) -> bool:
    return bool(of_images(ids, media_tokens(model.config)).any())
