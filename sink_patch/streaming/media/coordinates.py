"""Positions of several coordinates (M-RoPE), which a model makes of a prompt with images, and its decoder is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sink_patch.arguments import Sizes
from sink_patch.errors import UnsupportedGenerationError
from sink_patch.rules.plans import RowPlan
from sink_patch.rules.rows import Row
from sink_patch.streaming.media.masks import Masks
from sink_patch.streaming.media.placing import check_in_place, checked_coordinates, of_images
from sink_patch.streaming.media.told import Digests, noted, placed, with_images
from sink_patch.streaming.steps.step import Step


class Coordinates:
    """What the forward in progress tells of positions: the model makes them, and the cache counts on from there.

    In the first forward of a stream no position of the cache differs from the model's own. So the model keeps what it
    was given or makes its own, and the hook before its decoder `note`s them. When the forward ends, the rows are told.
    Those of a later turn it makes as of a text that begins there, and they are moved behind what was read; so are those
    of a piece of a prompt, which it has made of the whole (`go_on`).

    `masks` are those of images that see themselves in both directions.
    """

    def __init__(self) -> None:
        self._clear()

    def forget(self) -> None:
        """Another forward begins."""
        if self.columns is not None or self._of_image is not None:  # else there is nothing to forget
            self._clear()

    def _clear(self) -> None:
        self.columns: int | None = None  # of a forward with images
        self._of_image: torch.Tensor | None = None  # [rows, columns]
        self._are_several = False  # whether positions of it have several coordinates
        self._is_piece = False
        self._noted: torch.Tensor | None = None  # [coordinates, rows, columns]
        self._made: torch.Tensor | None = None  # of a later turn or a piece, [coordinates, rows, columns], from 0 on
        self._starts: Sequence[int] = ()  # where the text that they count from begins, row by row
        self._following: torch.Tensor | None = None  # [rows], positions of what comes behind a piece, from 0 on
        self._brought: Digests = ()  # digests of the images of it, row by row
        self._in_place_of, self._tokens = 0, frozenset[int]()
        self._later: torch.Tensor | None = None  # ids of a later turn, [rows, columns], until the decoder is called
        self.masks = Masks()

    def look_for(
        self,
        ids: torch.Tensor,
        tokens: frozenset[int],
        brought: Digests = (),
        in_place_of: int = 0,
        later: bool = False,
    ) -> None:
        """A forward with images begins.

        Args:
            ids: of it, [rows, columns].
            tokens: ids that stand for images.
            brought: digests of the images that count as read when it has ended, row by row.
            in_place_of: how many of those noted last they take the place of.
            later: whether it is one of a later turn.
        """
        self._of_image = of_images(ids, tokens)  # first: what is noted is forgotten where there is this
        self._brought, self._in_place_of, self._later = brought, in_place_of, ids if later else None
        self._tokens = tokens

    def expect(self, given: Any) -> torch.Tensor | None:
        """Its positions have several coordinates.

        Args:
            given: its position_ids; None: there are none.

        Returns:
            The position_ids that it should have: with several coordinates, or none, so that the model makes them.
        """
        self._are_several = True
        return given if isinstance(given, torch.Tensor) and given.ndim > 2 else None

    def go_on(
        self,
        made: torch.Tensor,
        starts: Sequence[int],
        *,
        by_piece: bool = False,
        following: torch.Tensor | None = None,
    ) -> None:
        """They are several behind what was read, where the model has made them as of a text that begins there.

        Args:
            made: positions of the forward in that text, [coordinates, rows, columns].
            starts: positions at which that text begins, row by row, as if no clock had ever been set back.
            by_piece: whether the decoder is called by itself, for a piece of that text.
            following: [rows], positions in that text of what comes behind the piece; None: it is the last one.
        """
        self._made, self._starts, self._are_several = made, starts, True
        self._is_piece, self._following = by_piece, following

    def placed(self, step: Step | None, horizon: int) -> dict[str, torch.Tensor]:
        """The positions of a forward behind others, if the model has made them: behind what its rows have read.

        Raises:
            UnsupportedGenerationError: a video goes so far that it would come to the horizon.
        """
        if self._made is None or step is None:
            return {}
        plans = step.plans
        moved = [start - plan.base for start, plan in zip(self._starts, plans, strict=True)]
        position_ids = self._made + torch.tensor(moved, device=self._made.device)[:, None]  # [3, rows, columns]
        most, counted = int(position_ids.max()), max(plan.first_position + plan.new for plan in plans)
        if most >= max(counted, horizon):
            raise UnsupportedGenerationError(
                f"A video was given to a SinkCache that would come to position {most}, and the model's context ends at "
                f"{horizon}. Use fewer seconds a frame, or a new SinkCache."
            )
        if self._is_piece:
            self._noted = position_ids
        return {"position_ids": position_ids}

    def note(self, decoder: nn.Module, named: Mapping[str, Any]) -> None:
        """The decoder is called, with position_ids [coordinates, rows, columns]; a fourth, the first, counts tokens.

        Raises:
            UnsupportedGenerationError: there are none of several coordinates, or the images of a later turn are not
                among its embeddings.
        """
        if self._later is not None:
            check_in_place(decoder, self._later, self._tokens, named.get("inputs_embeds"))
            self._later = None
        if self._of_image is not None and self._are_several:
            rows, columns = self._of_image.shape
            self._noted = checked_coordinates(named.get("position_ids"), rows, columns)

    def told(self, rows: list[Row], plans: Sequence[RowPlan], sizes: Sizes, horizon: int) -> list[Row]:
        """The rows when the forward has ended, which know where their images stand.

        Args:
            rows: with the tokens of the forward.
            plans: of the forward, row by row.
            sizes, horizon: of the cache.

        Raises:
            UnsupportedGenerationError: the decoder was called in a graph, where nobody could look; or a video among
                the sinks goes so far that text behind it would come to the horizon, however the clock is set.
        """
        if self.masks.are_due:
            self.masks.check_made()
        if self._of_image is None:
            return rows
        if self._brought:
            rows = noted(rows, self._brought, self._in_place_of)
        of_image = self._of_image.cpu()
        if not self._are_several:
            self.forget()
            return [with_images(row, found) for row, found in zip(rows, of_image, strict=True)]
        positions, ends = self._positions(), self._ends(len(rows))
        self.forget()
        sinks = sizes.num_sink_tokens
        found = [
            placed(row, positions[:, number, -new:] + row.base, of_image[number, -new:], sinks, ends[number])
            if (new := plan.new)
            else row
            for number, (row, plan) in enumerate(zip(rows, plans, strict=True))
        ]
        end = max(row.sink_end for row in found)
        if end + sizes.window_length - sinks > horizon:
            raise UnsupportedGenerationError(
                f"A prompt was given to a SinkCache with images or a video among its {sinks} sinks that end at "
                f"position {end}, and behind them a window_length of {sizes.window_length} comes to {horizon}, the end "
                "of the model's context. Use fewer sinks, a shorter window, or fewer seconds a frame."
            )
        return found

    def _positions(self) -> torch.Tensor:
        """Those that the decoder was given, [3, rows, columns]."""
        if self._noted is None:
            raise UnsupportedGenerationError(
                "A prompt with images went through a compiled forward with a SinkCache, which cannot see there at "
                "which positions they stand. Compile single tokens alone: generate(..., compile_config=...) does."
            )
        return self._noted.cpu().long()  # some models make whole numbers of another type

    def _ends(self, rows: int) -> list[int | None]:
        """Positions of what comes behind a piece, row by row; None: it is not written yet."""
        if self._following is None:
            return [None] * rows
        return [start + int(end) for start, end in zip(self._starts, self._following.tolist(), strict=True)]
