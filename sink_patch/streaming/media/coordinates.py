"""Positions of several coordinates (M-RoPE), which a model makes of a prompt with images, and its decoder is given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from sink_patch.arguments import Sizes
from sink_patch.errors import UnsupportedGenerationError
from sink_patch.rules.media import places_of
from sink_patch.rules.rows import Row


class Coordinates:
    """What the forward in progress tells of positions: the model makes them, and the cache counts on from there.

    In the first forward of a stream no position of the cache differs from the model's own. So the model keeps what it
    was given or makes its own, and the hook before its decoder `note`s them. When the forward ends, the rows are told.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Another forward begins."""
        self.columns: int | None = None  # of a forward with images
        self._of_image: torch.Tensor | None = None  # [rows, columns]
        self._are_several = False  # whether positions of it have several coordinates
        self._noted: torch.Tensor | None = None  # [coordinates, rows, columns]
        self._brought: Sequence[tuple[str, ...]] = ()  # digests of the images of it, row by row

    def look_for(self, ids: torch.Tensor, tokens: Iterable[int], brought: Sequence[tuple[str, ...]] = ()) -> None:
        """A forward with images begins.

        Args:
            ids: of it, [rows, columns].
            tokens: ids that stand for images.
            brought: digests of the images that count as read when it has ended, row by row.
        """
        self._brought = brought
        self._of_image = torch.isin(ids, torch.tensor(sorted(tokens), dtype=ids.dtype, device=ids.device))

    def expect(self, given: Any) -> torch.Tensor | None:
        """Its positions have several coordinates.

        Args:
            given: its position_ids; None: there are none.

        Returns:
            The position_ids that it should have: with several coordinates, or none, so that the model makes them.
        """
        self._are_several = True
        return given if isinstance(given, torch.Tensor) and given.ndim > 2 else None

    def note(self, position_ids: Any) -> None:
        """The decoder is called with these, [coordinates, rows, columns]; a fourth one, the first, counts tokens.

        Raises:
            UnsupportedGenerationError: there are none of several coordinates.
        """
        if self._of_image is None or not self._are_several:
            return
        if not isinstance(position_ids, torch.Tensor) or position_ids.ndim != 3 or position_ids.shape[0] not in (3, 4):
            shape = list(position_ids.shape) if isinstance(position_ids, torch.Tensor) else None
            raise UnsupportedGenerationError(
                f"A prompt with images was given with a SinkCache, and the model gives its decoder position_ids of "
                f"shape {shape}, not of three coordinates. Pass all that the processor returns (image_grid_thw and "
                "mm_token_type_ids among it), or use another cache."
            )
        self._noted = position_ids[-3:].expand(3, *self._of_image.shape)

    def told(self, rows: Sequence[Row], sizes: Sizes, horizon: int) -> list[Row]:
        """The rows when the forward has ended, which know where their images stand.

        Raises:
            UnsupportedGenerationError: the decoder was called in a graph, where nobody could look; or a video among
                the sinks goes so far that text behind it would come to the horizon, however the clock is set.
        """
        if self._of_image is None:
            return list(rows)
        if self._brought:
            rows = [replace(row, images=row.images + new) for row, new in zip(rows, self._brought, strict=True)]
        of_image = self._of_image.cpu()
        if not self._are_several:
            self.forget()
            return [_with_images(row, found) for row, found in zip(rows, of_image, strict=True)]
        if self._noted is None:
            raise UnsupportedGenerationError(
                "A prompt with images went through a compiled forward with a SinkCache, which cannot see there at "
                "which positions they stand. Compile single tokens alone: generate(..., compile_config=...) does."
            )
        noted = self._noted.cpu()
        self.forget()
        sinks = sizes.num_sink_tokens
        placed = [
            _placed(row, noted[:, number, -row.seen :], of_image[number, -row.seen :], sinks)
            for number, row in enumerate(rows)
        ]
        end = max(row.sink_end for row in placed)
        if end + sizes.window_length - sinks > horizon:
            raise UnsupportedGenerationError(
                f"A prompt was given to a SinkCache with images or a video among its {sinks} sinks that end at "
                f"position {end}, and behind them a window_length of {sizes.window_length} comes to {horizon}, the end "
                "of the model's context. Use fewer sinks, a shorter window, or fewer seconds a frame."
            )
        return placed


def _with_images(row: Row, of_image: torch.Tensor) -> Row:
    """A row that knows where its last image ends; `of_image` are the columns of a forward, its tokens at the end."""
    behind = len(of_image) - int(of_image.nonzero().max()) - 1 if bool(of_image.any()) else None
    return row if behind is None else replace(row, images_end=row.seen - behind)


def _placed(row: Row, coordinates: torch.Tensor, of_image: torch.Tensor, num_sink_tokens: int) -> Row:
    """A row that knows of its images.

    Args:
        coordinates: of its tokens, [3, tokens].
        of_image: which of them belong to images, [tokens].
    """
    # as in `generate`; at the end of a video, whose coordinates may go further, nothing is written
    last = coordinates if bool(of_image[-1]) else coordinates[:, -1]
    places = places_of(of_image.tolist(), coordinates.amin(dim=0).tolist(), int(last.max()) + 1)
    sinks = coordinates[:, :num_sink_tokens]
    end = int(sinks.max()) + 1 if places and bool(of_image[:num_sink_tokens].any()) else 0
    return replace(row, places=places, sink_end=end)
