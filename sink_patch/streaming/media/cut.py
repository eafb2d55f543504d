"""How a prompt with images goes in by pieces, none of which cuts an image, while encoders run once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sink_patch.errors import UnsupportedGenerationError
from sink_patch.models.families.media import ALL
from sink_patch.rules.media import pieces
from sink_patch.streaming.media.placing import check_in_place, checked_coordinates, of_images

_NO_MASK = (1, 1, 1, 1)


@dataclass(frozen=True)
class Whole:
    """A prompt that goes in by pieces, maybe one of a later turn.

    Args:
        ids: of it, [rows, columns].
        tokens: ids that stand for images.
        is_later: whether columns were read before.
        mask: None, or [rows, columns of the stream].
        types: of its columns, [rows, columns], where images see themselves in both directions; None: there are none.
        both_ways: what does, see `Media`.
        starts: where positions have several coordinates, at which ones it begins, row by row.
    """

    ids: torch.Tensor
    tokens: frozenset[int]
    is_later: bool
    mask: Any = None
    types: torch.Tensor | None = None
    both_ways: str = ""
    starts: Sequence[int] = ()

    @property
    def joined(self) -> list[bool]:
        """Of each column, whether it goes on with an image (of any row) that has begun in a column before."""
        of_image = of_images(self.ids, self.tokens)  # [rows, columns]
        if self.types is not None:
            of_image |= self.types.to(of_image.device) > 0
        if self.both_ways == ALL:  # from the first one to the last one
            of_image = (of_image.cumsum(1) > 0) & (of_image.flip(1).cumsum(1).flip(1) > 0)
        return [False, *(of_image[:, 1:] & of_image[:, :-1]).any(dim=0).tolist()]

    @property
    def prepared_mask(self) -> torch.Tensor | None:
        """What a model is given in place of a mask, so that it makes none for the whole; None: it makes none."""
        return torch.zeros(_NO_MASK, device=self.ids.device) if self.both_ways else None


@dataclass(frozen=True)
class Piece:
    """A piece of a prompt.

    Args:
        ids: of it, [rows, columns].
        given: the arguments of the decoder for it.
        types: of its columns, [rows, columns]; None: there are none.
        following: [rows], where positions have several coordinates, those of the next column; None: it is the last.
    """

    ids: torch.Tensor
    given: dict[str, Any]
    types: torch.Tensor | None
    following: torch.Tensor | None


class Cut:
    """A prompt with images that goes in by pieces, which are cut where the decoder is called: encoders run once.

    The forward of the whole prompt is none over the cache. Where it calls the decoder, each piece but the last is fed
    to the decoder by itself, and the call goes on with the last one.

    Args:
        size: columns of a piece; see `pieces`.

    `whole` is the prompt, once its forward has begun; `ahead` is how many pieces go in before the last one, and
    `is_fed` whether they are in.
    """

    def __init__(self, size: int):
        self._size = size
        self.whole: Whole | None = None
        self.ahead, self.is_fed, self._is_called = 0, False, False
        self._piece: Piece | None = None  # that goes in

    @property
    def is_begun(self) -> bool:
        """Whether what is called next is the decoder."""
        return self._piece is not None or (self.whole is not None and not self._is_called)

    def feed_ahead(self, decoder: nn.Module, named: dict[str, Any], whole: Whole) -> Piece:
        """The decoder is called: with the whole prompt by the model, with a piece of it from here.

        Returns:
            The piece that is to go in now.

        Raises:
            UnsupportedGenerationError: the model gives its decoder something by columns that is not known, or has left
                the images of a later turn out.
        """
        if self._piece is None:
            self._is_called = True
            if whole.is_later:
                check_in_place(decoder, whole.ids, whole.tokens, named.get("inputs_embeds"))
            *ahead, last = list(self._split(whole, named))
            self.ahead = len(ahead)
            for self._piece in ahead:
                decoder(**self._piece.given)
            self.is_fed, self._piece = True, last
        piece, self._piece = self._piece, None
        return piece

    def _split(self, whole: Whole, named: dict[str, Any]) -> Iterator[Piece]:
        if whole.both_ways:
            named = {**named, "attention_mask": whole.mask}
        made = checked_coordinates(named.get("position_ids"), *whole.ids.shape) if whole.starts else None
        for first, end in pieces(whole.joined, self._size):
            given = {name: _cut(name, value, whole.ids, first, end) for name, value in named.items()}
            given |= _of_images(named, whole.ids, first, end)
            types = None if whole.types is None else whole.types[:, first:end]
            following = None if made is None or end == made.shape[-1] else made[:, :, end].amin(dim=0)  # [rows]
            yield Piece(whole.ids[:, first:end], given, types, following)


def _cut(name: str, value: Any, ids: torch.Tensor, first: int, end: int) -> Any:
    """The columns of a piece of an argument of the decoder."""
    columns = ids.shape[1]
    if not isinstance(value, torch.Tensor):
        return value
    before = value.shape[-1] - columns  # columns of the stream before, in a later turn
    if name == "attention_mask" and value.ndim == 2 and before >= 0:
        return value[:, : before + end]  # [rows, columns so far]
    if name in ("position_ids", "cache_position") and before >= 0:
        return value[..., before + first : before + end]
    if value.ndim > 1 and value.shape[:2] == ids.shape:
        return value[:, first:end]
    raise _not_cut(f"{name} of shape {list(value.shape)}")


def _of_images(named: Mapping[str, Any], ids: torch.Tensor, first: int, end: int) -> dict[str, Any]:
    """Arguments with tensors in lists and the like, for a piece: what the encoder's layers made of images (deepstack).

    Such a tensor is [columns of images, ...], in the order of the rows, and a mask says which columns these are.
    """
    others = [value for name, value in named.items() if name != "attention_mask" and isinstance(value, torch.Tensor)]
    masks = [value for value in others if value.dtype == torch.bool]
    masks = [mask.reshape(ids.shape) for mask in masks if mask.shape[:2] == ids.shape and mask.numel() == ids.numel()]

    def of_piece(name: str, value: Any) -> Any:
        mask = next((mask for mask in masks if int(mask.sum()) == len(value)), None)
        if mask is None:
            raise _not_cut(name)
        places = (mask.flatten().cumsum(0) - 1).view_as(mask)  # [rows, columns]
        return value[places[:, first:end][mask[:, first:end]].to(value.device)]

    found = dict[str, Any]()
    for name, value in named.items():
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        if not any(isinstance(part, torch.Tensor) for part in parts):
            continue
        if type(value) not in (dict, list, tuple) or not all(isinstance(part, torch.Tensor) for part in parts):
            raise _not_cut(name)
        cut = [of_piece(name, part) for part in parts]
        found[name] = dict(zip(value, cut, strict=True)) if isinstance(value, dict) else type(value)(cut)
    return found


def _not_cut(what: str) -> UnsupportedGenerationError:
    return UnsupportedGenerationError(
        f"A prompt with images was to go into a sink cache by pieces, and the model gives its decoder {what}, which "
        "cannot be cut. Give a prompt that goes in at once, or use another cache."
    )
