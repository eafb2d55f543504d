"""What rows know of their images when a forward has brought some."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from sink_patch.rules.media import Span, places_of, spans_of
from sink_patch.rules.rows import Row

Digests = Sequence[tuple[str, ...]]
"""Of images, row by row."""


def noted(rows: Sequence[Row], brought: Digests, in_place_of: int) -> list[Row]:
    """Rows that know which images they have read: those that were brought, in place of so many that were noted last."""
    before = [row.images[: len(row.images) - in_place_of] for row in rows]
    return [replace(row, images=old + new) for row, old, new in zip(rows, before, brought, strict=True)]


def with_images(row: Row, of_image: torch.Tensor) -> Row:
    """A row that knows where its last image ends; `of_image` are the columns of a forward, its tokens at the end."""
    behind = len(of_image) - int(of_image.nonzero().max()) - 1 if bool(of_image.any()) else None
    if behind is None:
        return row
    return replace(row, images_end=row.seen - behind, spans=_with_spans(row, of_image))


def _with_spans(row: Row, of_image: torch.Tensor) -> tuple[Span, ...]:
    return row.spans + spans_of(of_image.tolist(), row.seen - len(of_image))


def placed(
    row: Row, coordinates: torch.Tensor, of_image: torch.Tensor, num_sink_tokens: int, end: int | None = None
) -> Row:
    """A row that knows of its images.

    Args:
        coordinates: of its newest tokens, [3, tokens], as if its clock had never been set back.
        of_image: which of them belong to images, [tokens].
        end: position of the token that follows; None: it is not written yet.
    """
    # as in `generate`; at the end of a video, whose coordinates may go further, nothing is written
    last = coordinates if bool(of_image[-1]) else coordinates[:, -1]
    seen = row.seen - len(of_image)
    lowest = coordinates.amin(dim=0).tolist()
    places = places_of(of_image.tolist(), lowest, int(last.max()) + 1 if end is None else end, row.places, seen)
    sinks, sink_end = max(0, num_sink_tokens - seen), row.sink_end
    if places and sinks and (sink_end or bool(of_image[:sinks].any())):
        sink_end = max(sink_end, int(coordinates[:, :sinks].max()) + 1)
    return replace(row, places=places, sink_end=sink_end, spans=_with_spans(row, of_image))
