"""Positions of several coordinates (M-RoPE), which a model makes of a prompt with images, and its decoder is given."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sink_patch.arguments import Sizes
from sink_patch.compat.models import maker_of_positions
from sink_patch.errors import UnsupportedGenerationError
from sink_patch.rules.rows import Row
from sink_patch.streaming.media.placing import check_in_place, of_images
from sink_patch.streaming.media.told import Digests, noted, placed, with_images
from sink_patch.streaming.steps import Step

_BY_COLUMNS = ("attention_mask", "mm_token_type_ids")


class Coordinates:
    """What the forward in progress tells of positions: the model makes them, and the cache counts on from there.

    In the first forward of a stream no position of the cache differs from the model's own. So the model keeps what it
    was given or makes its own, and the hook before its decoder `note`s them. When the forward ends, the rows are told.
    Those of a later turn it makes as of a text that begins there (`make`), and they are moved behind what was read.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Another forward begins."""
        self.columns: int | None = None  # of a forward with images
        self._of_image: torch.Tensor | None = None  # [rows, columns]
        self._are_several = False  # whether positions of it have several coordinates
        self._noted: torch.Tensor | None = None  # [coordinates, rows, columns]
        self._made: torch.Tensor | None = None  # of a later turn, [coordinates, rows, columns], from 0 on
        self._brought: Digests = ()  # digests of the images of it, row by row
        self._in_place_of, self._tokens = 0, frozenset[int]()
        self._later: torch.Tensor | None = None  # ids of a later turn, [rows, columns], until the decoder is called

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
        self._brought, self._in_place_of, self._later = brought, in_place_of, ids if later else None
        self._tokens = tokens
        self._of_image = of_images(ids, tokens)

    def expect(self, given: Any) -> torch.Tensor | None:
        """Its positions have several coordinates.

        Args:
            given: its position_ids; None: there are none.

        Returns:
            The position_ids that it should have: with several coordinates, or none, so that the model makes them.
        """
        self._are_several = True
        return given if isinstance(given, torch.Tensor) and given.ndim > 2 else None

    def make(self, module: nn.Module, ids: torch.Tensor, mask: Any, told: Mapping[str, Any]) -> None:
        """They are several in a later turn, of which the model can make them as of a text that begins here.

        Args:
            module: the model.
            ids: of the forward, [rows, columns].
            mask: None, or [rows, columns of the stream or of the forward].
            told: arguments that tell of the images.

        Raises:
            UnsupportedGenerationError: some are missing.
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
        self._made, self._are_several = maker(**given)[0], True

    def placed(self, step: Step | None, horizon: int) -> dict[str, torch.Tensor]:
        """The positions of a forward of a later turn, if the model has made them: behind what its rows have read.

        Raises:
            UnsupportedGenerationError: a video goes so far that it would come to the horizon.
        """
        if self._made is None or step is None:
            return {}
        plans = step.plans
        first = torch.tensor([plan.first_position for plan in plans], device=self._made.device)
        position_ids = self._made + first[:, None]  # [3, rows, columns]
        most, counted = int(position_ids.max()), max(plan.first_position + plan.new for plan in plans)
        if most >= max(counted, horizon):
            raise UnsupportedGenerationError(
                f"A video was given to a SinkCache that would come to position {most}, and the model's context ends at "
                f"{horizon}. Use fewer seconds a frame, or a new SinkCache."
            )
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
        position_ids = named.get("position_ids")
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

    def told(self, rows: Sequence[Row], new: Sequence[int], sizes: Sizes, horizon: int) -> list[Row]:
        """The rows when the forward has ended, which know where their images stand.

        Args:
            rows: with the tokens of the forward.
            new: how many these are, row by row.
            sizes, horizon: of the cache.

        Raises:
            UnsupportedGenerationError: the decoder was called in a graph, where nobody could look; or a video among
                the sinks goes so far that text behind it would come to the horizon, however the clock is set.
        """
        if self._of_image is None:
            return list(rows)
        if self._brought:
            rows = noted(rows, self._brought, self._in_place_of)
        of_image = self._of_image.cpu()
        if not self._are_several:
            self.forget()
            return [with_images(row, found) for row, found in zip(rows, of_image, strict=True)]
        if self._noted is None:
            raise UnsupportedGenerationError(
                "A prompt with images went through a compiled forward with a SinkCache, which cannot see there at "
                "which positions they stand. Compile single tokens alone: generate(..., compile_config=...) does."
            )
        positions = self._noted.cpu().long()  # some models make whole numbers of another type
        self.forget()
        sinks = sizes.num_sink_tokens
        found = [
            placed(row, positions[:, number, -count:] + row.base, of_image[number, -count:], sinks) if count else row
            for number, (row, count) in enumerate(zip(rows, new, strict=True))
        ]
        end = max(row.sink_end for row in found)
        if end + sizes.window_length - sinks > horizon:
            raise UnsupportedGenerationError(
                f"A prompt was given to a SinkCache with images or a video among its {sinks} sinks that end at "
                f"position {end}, and behind them a window_length of {sizes.window_length} comes to {horizon}, the end "
                "of the model's context. Use fewer sinks, a shorter window, or fewer seconds a frame."
            )
        return found
