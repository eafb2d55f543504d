"""What transformers does to all rows of a cache at once: beams, batches, a fresh start."""

from __future__ import annotations

import torch

from sink_patch.errors import CacheStateError
from sink_patch.streams import Streams


class RowOperations:
    """The part of `SinkCache` that rearranges its rows."""

    _streams: Streams | None

    def reset(self) -> None:
        """Forget all tokens; stay bound to the model."""
        if self._streams is not None:
            self._streams.reset()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        if self._streams is not None and self._streams.rows is not None:
            self.batch_select_indices(torch.arange(len(self._streams.rows)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, in that order; a boolean mask over the rows will do too."""
        if self._streams is not None:
            self._streams.select_rows(indices)

    def forget(self, count: int, asked: str) -> None:
        """Take back the newest `count` tokens; possible only while nothing has left the window.

        Raises:
            CacheStateError: tokens that would have to come back are gone.
        """
        if self._streams is not None and not self._streams.crop(count):
            raise CacheStateError(
                f"{self!r} cannot be cropped by {asked}: that takes newest tokens back, at most as many as there are, "
                "and only while no token has left the window."
            )
