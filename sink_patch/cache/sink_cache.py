"""`SinkCache`: attention sinks and a window of the newest tokens, for ever.

Source: StreamingLLM, arXiv 2309.17453, section 3. The cache holds the first `num_sink_tokens` tokens of each stream and
the newest `window_length - num_sink_tokens`; positions are positions within the cache.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sink_patch.arguments import DEFAULT_NUM_SINK_TOKENS, DEFAULT_WINDOW_LENGTH, check_window
from sink_patch.buffers.layers import SinkLayer
from sink_patch.cache.copies import Keeping
from sink_patch.cache.operations import RowOperations
from sink_patch.compat import installed_shim
from sink_patch.errors import CacheStateError
from sink_patch.models.entries import own_layers, text_config, unwrapped
from sink_patch.models.examine import LayerFacts, ModelFacts, examine, horizon
from sink_patch.rules.kinds import LayerKind
from sink_patch.streaming import hooks as seam
from sink_patch.streaming.forward import Forwards
from sink_patch.streaming.streams import Streams

if TYPE_CHECKING:
    from sink_patch.compat.bases import Newest as CacheBase
else:
    CacheBase = installed_shim().cache_base()


class SinkCache(RowOperations, Keeping, Forwards, CacheBase):
    """A cache of fixed size with which a model generates without end.

    Args:
        window_length: tokens that are kept, sinks counted in.
        num_sink_tokens: how many of the first tokens of each row are kept for good.
        model: the model that will use it; `generate` binds a cache that has none.

    `get_seq_length()` counts all columns ever fed, and `attention_mask` covers the whole stream, as with any cache of
    transformers; `position_ids` are set by the cache. Rows are streams of their own; padding to the left of a row's
    tokens is dropped. Gradients do not flow into the cache.

    Raises:
        SinkArgumentError: impossible sizes.
        UnsupportedModelError: the model cannot stream.
    """

    layers: list[Any]  # of `SinkLayer`, one for each layer of the model; empty while unbound

    def __init__(
        self,
        window_length: int = DEFAULT_WINDOW_LENGTH,
        num_sink_tokens: int = DEFAULT_NUM_SINK_TOKENS,
        *,
        model: nn.Module | None = None,
    ):
        self.window_length, self.num_sink_tokens = check_window(window_length, num_sink_tokens)
        super().__init__()
        self._facts: ModelFacts | None = None
        self._streams: Streams | None = None
        self._is_sliding: list[bool] = []
        self._states_alone: list[bool] = []
        self._entrances: tuple[weakref.ref[nn.Module], ...] = ()
        self._rest()
        if model is not None:
            self.bind(model)

    def __repr__(self) -> str:
        bound = "unbound" if self._facts is None else f"model={self._facts.model_class}, layers={len(self.layers)}"
        size = f"window_length={self.window_length}, num_sink_tokens={self.num_sink_tokens}"
        return f"{type(self).__name__}({size}, {bound}, seen={self.get_seq_length()})"

    def bind(self, model: nn.Module) -> None:
        """Tie the cache to a model: find and prove its adapters, and let its forward know sink caches.

        Raises:
            UnsupportedModelError: the model cannot stream; neither the cache nor the model is changed.
            SinkArgumentError: the window does not fit the model's positions.
            CacheStateError: the cache holds the tokens of another model.
        """
        model = unwrapped(model)
        if self.is_bound_to(model):
            return
        self.check(model)
        facts = examine(model)
        self._tie(model, facts, self._new_streams(facts, self._new_layers(facts, text_config(model))))

    def _tie(self, model: nn.Module, facts: ModelFacts, streams: Streams) -> None:
        self._streams, self.layers, self._facts = streams, list(streams.layers), facts
        self._is_sliding = [getattr(layer, "is_sliding", False) for layer in self.layers]
        self._states_alone = [not isinstance(layer, SinkLayer) for layer in self.layers]
        self._entrances = tuple(weakref.ref(module) for module in seam.install(model))

    def check(self, model: nn.Module) -> None:
        """Raise what `bind` would raise, and change nothing."""
        model = unwrapped(model)
        if self.is_initialized and not self.is_bound_to(model):
            raise CacheStateError(
                f"{self!r} holds the tokens of another model than this {type(model).__name__}. Use a new SinkCache, or "
                "reset() this one first."
            )
        horizon(examine(model), self.window_length, self.num_sink_tokens)

    def is_bound_to(self, model: nn.Module) -> bool:
        """Whether the cache belongs to this model (or to the model that this decoder is a part of)."""
        return any(entrance() is model for entrance in self._entrances)

    def fits_in_one_forward(self, columns: int) -> bool:
        """Whether so many new tokens, fed at once, stay within the context that the model was trained on."""
        if self._streams is None or not self._streams.kinds or self._streams.one_by_one is not None:
            return True
        if columns <= self.window_length - self.num_sink_tokens:
            return True
        return self._streams.positions_needed(columns) <= self._streams.context.length

    def _new_layers(self, facts: ModelFacts, config: Any) -> list[Any]:
        own = own_layers(config) if any(layer.entry.state for layer in facts.layers) else [None] * len(facts.layers)
        return [self._new_layer(layer, theirs) for layer, theirs in zip(facts.layers, own, strict=True)]

    def _new_streams(self, facts: ModelFacts, layers: list[Any]) -> Streams:
        sizes = (self.window_length, self.num_sink_tokens)
        stateful = any(layer.entry.state for layer in facts.layers)
        clock = horizon(facts, *sizes)
        return Streams(*sizes, facts.context, clock, layers, stateful=stateful, one_by_one=facts.one_by_one)

    def _new_layer(self, layer: LayerFacts, theirs: Any) -> Any:
        """Ours where there is attention, transformers' own where there is none."""
        entry = layer.entry
        if not entry.attention:
            return theirs
        make = self._with_state(entry.number_of_states) if entry.state else SinkLayer
        kind = layer.kind(self.window_length, self.num_sink_tokens)
        return make(kind, layer.adapter.keys, layer.adapter.values, sliding=entry.sliding_window is not None)

    @staticmethod
    def _with_state(number_of_states: int) -> Any:
        from sink_patch.models.stateful import StatefulSinkLayer  # what it derives from is not in every transformers

        return partial(StatefulSinkLayer, number_of_states=number_of_states)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new states [rows, heads, columns, head_dim] of a layer; return what it attends to in this forward."""
        step = self._current_step()
        if key_states.shape[2] != step.columns:
            raise CacheStateError(f"Layer {layer_idx} has {key_states.shape[2]} tokens in a forward of {step.columns}.")
        layer: SinkLayer = self.layers[layer_idx]
        return layer.update(key_states, value_states, step)

    def update_indexer(self, indexer_key_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """Keys of a learned index, [rows, visible columns, dim]; any will do.

        Within the positions that such a model may use, its index chooses all keys that are visible.
        """
        rows, _, dim = indexer_key_states.shape
        length, _ = self._current_step().mask_sizes(self._kind(layer_idx))
        return indexer_key_states.new_zeros(rows, length, dim)

    def get_seq_length(self, layer_idx: int = 0, *_args: Any) -> int:  # noqa: ARG002 - as in transformers
        """Columns ever fed, padding counted in; it is never reset by evictions.

        During a forward it is what the model must see: the mask coordinate of the first new token.
        """
        if self._streams is None:
            return 0
        if self._streams.step is None or not self._is_running():
            return self._streams.columns
        return self._streams.step.past_columns()

    def mask_of_past(self) -> torch.Tensor:
        """An attention mask over all columns fed so far, int64 [rows, columns]: padding counts as the oldest ones."""
        rows = [] if self._streams is None else self._streams.rows or []
        seen = torch.tensor([row.seen for row in rows])[:, None]  # [rows, 1]
        columns = self.get_seq_length()
        return (torch.arange(columns)[None, :] >= columns - seen).long()

    def past_columns(self) -> int:
        """Mask coordinate of the first new token, which is the same for all kinds of layers."""
        return self._current_step().past_columns()

    def mask_sizes(self, columns: int, layer_idx: int) -> tuple[int, int]:
        """(visible columns, mask coordinate of the first of them) of a layer."""
        step = self._current_step()
        if columns != step.columns:
            raise CacheStateError(f"A mask for {columns} tokens was asked for in a forward of {step.columns}.")
        return step.mask_sizes(self._kind(layer_idx))

    @property
    def is_sliding(self) -> list[bool]:
        """For each layer, whether the model gives it the mask of a sliding window."""
        return self._is_sliding

    def states_alone(self) -> list[bool]:
        """For each layer, whether it holds a recurrent or convolution state and no attention."""
        return self._states_alone

    def _kind(self, layer_idx: int) -> LayerKind:
        """The kind of a layer; masks are asked for by layer 0 where a model has no full or sliding attention there."""
        layers = (*self.layers[layer_idx:], *self.layers)
        return next(layer.kind for layer in layers if isinstance(layer, SinkLayer))

    def get_max_length(self, layer_idx: int | None = None) -> int:  # noqa: ARG002 - as in transformers
        """`window_length`: how many tokens are held at most."""
        return self.window_length

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values (not of recurrent states, which are transformers' own)."""
        return sum(ring.nbytes for layer in self.layers if isinstance(layer, SinkLayer) for ring in layer.rings)

    @property
    def batch_size(self) -> int:
        return -1 if self._streams is None or self._streams.rows is None else len(self._streams.rows)

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can take back any forward: only once `activate_past_recording` was called."""
        return self._streams is not None and self._streams.recording

    @property
    def is_initialized(self) -> bool:
        return self._streams is not None and self._streams.rows is not None
