"""Which columns are those of images, whether a model has put these in their place, and at which positions."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sink_patch.compat.models import maker_of_positions
from sink_patch.errors import UnsupportedGenerationError
from sink_patch.models.families.media import KINDS, media_tokens

_BY_COLUMNS = ("attention_mask", "mm_token_type_ids")


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


def made_positions(module: nn.Module, ids: torch.Tensor, mask: Any, told: Mapping[str, Any]) -> torch.Tensor:
    """Positions of several coordinates of a later turn, as the model makes them of a text that begins there.

    Args:
        module: the model.
        ids: of the turn, [rows, columns].
        mask: None, or [rows, columns of the stream or of the turn].
        told: arguments that tell of its images.

    Returns:
        [3, rows, columns], from 0 on in each row.

    Raises:
        UnsupportedGenerationError: some arguments are missing.
    """
    maker = maker_of_positions(module)
    parameters = {} if maker is None else inspect.signature(maker).parameters
    given = {name: told[name] for name in parameters if told.get(name) is not None}
    given |= {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask}  # some need one
    by_columns = [name for name, value in given.items() if name in _BY_COLUMNS and value is not None]
    given |= {name: given[name][:, -ids.shape[1] :] for name in by_columns}  # some versions give a whole history
    missing = [name for name, one in parameters.items() if one.default is one.empty and name not in given]
    missing = [name for name in missing if parameters[name].kind is not inspect.Parameter.VAR_KEYWORD]
    if maker is None or missing:
        raise UnsupportedGenerationError(
            f"Images were given in a later turn of a SinkCache, and {type(module).__name__} makes no positions for "
            f"them without {', '.join(missing) or 'get_rope_index'}. Pass all that the processor returns."
        )
    found: torch.Tensor = maker(**given)[0]
    _check_several(module, ids, found)
    return found


def _check_several(module: nn.Module, ids: torch.Tensor, made: torch.Tensor) -> None:
    """Refuse positions [3, rows, columns] of text for images: some models know an image by the token before it alone.

    Raises:
        UnsupportedGenerationError: as it says.
    """
    of_image = of_images(ids, media_tokens(module.config, [kind for kind in KINDS if kind.grids]))  # [rows, columns]
    is_text = (made == made[-1:]).all(dim=0).to(of_image.device)
    goes_on = torch.nn.functional.pad(of_image[:, :-1], (1, 0)) & of_image
    numbers = (of_image & ~goes_on).cumsum(dim=1)  # of images in each row
    for row in range(len(ids)):
        for number in range(1, int(numbers[row, -1]) + 1):
            image = of_image[row] & (numbers[row] == number)
            if int(image.sum()) > 1 and bool(is_text[row, image].all()):
                raise UnsupportedGenerationError(
                    f"An image was given in a later turn of a SinkCache, and {type(module).__name__} does not see "
                    "where it begins. Give the token that begins it in the same turn."
                )


def checked_coordinates(position_ids: Any, rows: int, columns: int) -> torch.Tensor:
    """The positions that a decoder is given, [3, rows, columns]; a fourth coordinate, the first, counts tokens.

    Raises:
        UnsupportedGenerationError: they have not several coordinates.
    """
    if not isinstance(position_ids, torch.Tensor) or position_ids.ndim != 3 or position_ids.shape[0] not in (3, 4):
        shape = list(position_ids.shape) if isinstance(position_ids, torch.Tensor) else None
        raise UnsupportedGenerationError(
            f"A prompt with images was given with a SinkCache, and the model gives its decoder position_ids of "
            f"shape {shape}, not of three coordinates. Pass all that the processor returns (image_grid_thw and "
            "mm_token_type_ids among it), or use another cache."
        )
    return position_ids[-3:].expand(3, rows, columns)
