"""How a prompt with images goes in by pieces, none of which cuts an image, while encoders run once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from sink_patch.errors import UnsupportedGenerationError
from sink_patch.models.families.media import media_tokens
from sink_patch.rules.media import pieces
from sink_patch.streaming.media.placing import check_in_place, of_images


class Cut:
    """A prompt with images that goes in by pieces, which are cut where the decoder is called: encoders run once.

    The forward of the whole prompt is none over the cache. Where it calls the decoder, each piece but the last is fed
    to the decoder by itself, and the call goes on with the last one.

    Args:
        size: columns of a piece; see `pieces`.

    `tokens` are the ids that stand for images, once the forward has begun; `ahead` is how many pieces go in before the
    last one, and `is_fed` whether they are in.
    """

    def __init__(self, size: int):
        self._size = size
        self._ids: torch.Tensor | None = None  # of the prompt, [rows, columns], once its forward has begun
        self.tokens = frozenset[int]()
        self.ahead, self.is_fed, self._is_later = 0, False, False
        self._piece: torch.Tensor | None = None  # ids of the piece that goes in, [rows, columns]

    @property
    def is_begun(self) -> bool:
        """Whether what is called next is the decoder."""
        return self._ids is not None or self._piece is not None

    def begin(self, module: nn.Module, named: Mapping[str, Any], *, later: bool) -> dict[str, Any]:
        """The forward of the whole prompt begins, maybe one of a later turn: what the model receives."""
        self._ids, self.tokens, self._is_later = named["input_ids"], media_tokens(module.config), later
        return dict(named)

    def feed_ahead(self, decoder: nn.Module, named: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        """The decoder is called: with the whole prompt by the model, with a piece of it from here.

        Returns:
            The ids of the columns that are to go in now, [rows, columns], and the arguments of the decoder for them.

        Raises:
            UnsupportedGenerationError: the model gives its decoder something by columns that is not known, or has left
                the images of a later turn out.
        """
        if self._piece is None and self._ids is not None:
            if self._is_later:
                check_in_place(decoder, self._ids, self.tokens, named.get("inputs_embeds"))
            *ahead, last = list(self._split(self._ids, named))
            self._ids, self.ahead = None, len(ahead)
            for self._piece, part in ahead:
                decoder(**part)
            self._piece, named = last
            self.is_fed = True
        ids, self._piece = self._piece, None
        return named["inputs_embeds"] if ids is None else ids, named

    def _split(self, ids: torch.Tensor, named: Mapping[str, Any]) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
        _check_lists(named)
        of_image = of_images(ids, self.tokens)  # [rows, columns]
        joined = (of_image[:, 1:] & of_image[:, :-1]).any(dim=0).tolist()
        for first, end in pieces([False, *joined], self._size):
            yield ids[:, first:end], {name: _cut(name, value, ids, first, end) for name, value in named.items()}


def _check_lists(named: Mapping[str, Any]) -> None:
    """Refuse tensors in lists and the like, as of the encoder's layers (deepstack): not by columns, but by images."""
    for name, value in named.items():
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        if any(isinstance(part, torch.Tensor) for part in parts):
            raise UnsupportedGenerationError(
                f"A prompt with images was to go into a sink cache by pieces, and the model gives its decoder {name}, "
                "which cannot be cut. Give a prompt that goes in at once, or use another cache."
            )


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
    raise UnsupportedGenerationError(
        f"A prompt with images was to go into a sink cache by pieces, and the model gives its decoder {name} of shape "
        f"{list(value.shape)}, which cannot be cut. Give a prompt that goes in at once, or use another cache."
    )
