"""What transformers asks of any cache, answered for a sink cache (cache_utils.py, `Cache`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sink_patch.arguments import Sizes, whole_number
from sink_patch.compat import installed_shim
from sink_patch.errors import CacheStateError, UnboundCacheError
from sink_patch.streaming.batches import BatchedCache
from sink_patch.streaming.bound import streams_of
from sink_patch.streaming.steps.step import Step
from sink_patch.streaming.streams import Streams

if TYPE_CHECKING:
    from sink_patch.compat.bases import CacheBase515 as CacheBase
else:
    CacheBase = installed_shim().cache_base()


class TransformersCache(BatchedCache, CacheBase):
    """The side of a sink cache that models and `generate` see.

    Args:
        sizes: of the cache. It has no layers yet.
    """

    layers: list[Any]  # of `SinkLayer`, one for each layer of the model; empty while unbound

    def __init__(self, sizes: Sizes):
        self.sizes = sizes
        super().__init__()

    @property
    def window_length(self) -> int:
        """Tokens that are kept, sinks counted in."""
        return self.sizes.window_length

    @property
    def num_sink_tokens(self) -> int:
        """How many of the first tokens of each row are kept for good."""
        return self.sizes.num_sink_tokens

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new states [rows, heads, columns, head_dim] of a layer; return what it attends to in this forward."""
        streams = self._streams
        step = None if streams is None else streams.forward.step_to_store()
        if step is None:
            raise self._not_in_a_forward()
        return self.layers[layer_idx].update(key_states, value_states, step.layouts)  # type: ignore[no-any-return]

    def update_indexer(self, indexer_key_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """Keys of a learned index, [rows, visible columns, dim]; any will do.

        Within the positions that such a model may use, its index chooses all keys that are visible.
        """
        rows, columns, dim = indexer_key_states.shape
        length, _ = self._mask_sizes(columns, layer_idx)
        return indexer_key_states.new_zeros(rows, length, dim)

    def get_seq_length(self, layer_idx: int = 0, *_args: Any) -> int:  # noqa: ARG002 - as in transformers
        """Columns ever fed, padding counted in; it is never reset by evictions.

        During a forward it is what the model must see: the mask coordinate of the first new token.
        """
        streams = self._streams
        if streams is None:
            return 0
        step = streams.forward.step
        return streams.columns if step is None or not streams.forward.is_running() else step.past_columns()

    def get_max_length(self, layer_idx: int | None = None) -> int:  # noqa: ARG002 - as in transformers
        """`window_length`: how many tokens are held at most."""
        return self.window_length

    @property
    def batch_size(self) -> int:
        return -1 if self._streams is None or self._streams.rows is None else len(self._streams.rows)

    @property
    def is_sliding(self) -> list[bool]:
        """For each layer, whether the model gives it the mask of a sliding window."""
        return [] if self._streams is None else [*self._streams.store.are_sliding]

    @property
    def is_compileable(self) -> bool:
        """Whether a graph of the model may be compiled with it: where `generate` asks that, and in the graph itself."""
        streams = self._streams
        if streams is None:
            return False
        if streams.forward.in_progress:
            return streams.forward.is_fixed
        return streams.offered_to_compiler and streams.can_be_fixed

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can take back any forward: only once `activate_past_recording` was called."""
        return self._streams is not None and self._streams.recording

    @property
    def is_initialized(self) -> bool:
        return self._streams is not None and self._streams.rows is not None

    def reset(self) -> None:
        """Forget all tokens; stay bound to the model.

        Raises:
            CacheStateError: a forward is in progress.
        """
        if self._streams is not None:
            self._streams.reset()

    def activate_past_recording(self, tokens: int = 0) -> None:
        """From now on `crop` can take back the tokens of the newest forward, and the newest `tokens` tokens at least.

        What leaves the window for them is kept aside until then, in so many slots more, and single tokens are read with
        a copy of the window. transformers calls this where it decodes with drafts (cache_utils.py).

        Raises:
            SinkArgumentError: no integer, or a negative one.
            CacheStateError: the cache is not bound to a model; it holds recurrent states, which cannot be taken back;
                or a forward is in progress.
        """
        tokens = whole_number("tokens", tokens, 8, "of tokens")
        self._recordable().record(tokens)

    def deactivate_past_recording(self) -> None:
        """Give the slots for that back; what has left the window is gone again."""
        self._recordable().stop_recording()

    def _past_columns(self) -> int:
        return self._step().past_columns()

    def _mask_sizes(self, columns: int, layer_idx: int) -> tuple[int, int]:
        step = self._step()
        if columns != step.columns:
            raise CacheStateError(f"A mask for {columns} tokens was asked for in a forward of {step.columns}.")
        layer = self._bound().store.attending_layer(layer_idx)
        return (columns, 0) if layer is None else step.mask_sizes(layer.kind_index)

    def _states_alone(self) -> list[bool]:
        return [] if self._streams is None else [*self._streams.store.of_states_alone]

    def _take_back(self, count: int, asked: str) -> None:
        if self._streams is not None and not self._streams.crop(count):
            raise CacheStateError(
                f"{self!r} cannot be cropped by {asked}: that takes newest tokens back, at most as many as there are, "
                "and what has left the window for them is gone. Call activate_past_recording() before they are fed."
            )

    def _recordable(self) -> Streams:
        if self._streams is None:
            raise CacheStateError(
                f"{self!r} was asked to record its past, but is not bound to a model. Make it with model=model."
            )
        if self._streams.facts.has_states:
            raise CacheStateError(
                f"{self!r} was asked to record its past, but holds recurrent states, which cannot be taken back. Feed "
                "only tokens that are to stay."
            )
        return self._streams

    def _bound(self) -> Streams:
        return streams_of(self)

    def _step(self) -> Step:
        step = self._bound().forward.step
        if step is None:
            raise self._not_in_a_forward()
        return step

    def _not_in_a_forward(self) -> UnboundCacheError:
        if self._streams is None:
            return UnboundCacheError.never("model", self.window_length, self.num_sink_tokens)
        return UnboundCacheError.elsewhere(repr(self), "model")
