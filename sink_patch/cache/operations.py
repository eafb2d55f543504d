"""What transformers does to all rows of a cache at once: beams, batches, a fresh start."""

from __future__ import annotations

import operator

import torch

from sink_patch.errors import CacheStateError
from sink_patch.streaming.streams import Streams


class RowOperations:
    """The part of `SinkCache` that rearranges its rows."""

    _streams: Streams | None

    def activate_past_recording(self, tokens: int = 0) -> None:
        """From now on `crop` can take back the tokens of the newest forward, and the newest `tokens` tokens at least.

        What leaves the window for them is kept aside until then, in so many slots more, and single tokens are read with
        a copy of the window. transformers calls this where it decodes with drafts (cache_utils.py).

        Raises:
            CacheStateError: the cache is not bound to a model, or holds recurrent states, which cannot be taken back.
        """
        self._recordable().record(tokens)

    def deactivate_past_recording(self) -> None:
        """Give the slots for that back; what has left the window is gone again."""
        self._recordable().stop_recording()

    def _recordable(self) -> Streams:
        if self._streams is None:
            raise CacheStateError(
                f"{self!r} was asked to record its past, but is not bound to a model. Make it with model=model."
            )
        if self._streams.stateful:
            raise CacheStateError(
                f"{self!r} was asked to record its past, but holds recurrent states, which cannot be taken back. Feed "
                "only tokens that are to stay."
            )
        return self._streams

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
        """Take back the newest `count` tokens; what had left the window for them comes back.

        Raises:
            CacheStateError: what would have to come back is gone.
        """
        if self._streams is not None and not self._streams.crop(operator.index(count)):  # some pass a tensor
            raise CacheStateError(
                f"{self!r} cannot be cropped by {asked}: that takes newest tokens back, at most as many as there are, "
                "and what has left the window for them is gone. Call activate_past_recording() before they are fed."
            )
