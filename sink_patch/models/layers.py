"""The layers of a cache for a model: ours where a layer has attention, transformers' own where it has none.

Such an entry holds states alone, or nothing: its layer has no attention, or attends to another layer's keys.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from sink_patch.arguments import Sizes
from sink_patch.buffers.layers import SinkLayer
from sink_patch.buffers.rotation import Rotation
from sink_patch.compat.models import state_arguments
from sink_patch.models.entries import own_layers
from sink_patch.models.facts import LayerFacts, ModelFacts
from sink_patch.rules.kinds import LayerKind


def make_layers(facts: ModelFacts, config: Any, sizes: Sizes) -> list[Any]:
    """Fresh layers, one for each entry of the model's own cache.

    Args:
        config: the model's text config.
    """
    without = any(not layer.entry.attention for layer in facts.layers)
    own = own_layers(config) if without else [None] * len(facts.layers)
    return [_layer(layer, theirs, sizes) for layer, theirs in zip(facts.layers, own, strict=True)]


def _layer(layer: LayerFacts, theirs: Any, sizes: Sizes) -> Any:
    entry = layer.entry
    if not entry.attention:
        return theirs
    kind = layer.kind(sizes.window_length, sizes.num_sink_tokens)
    sliding = entry.sliding_window is not None
    if not entry.state:
        return SinkLayer(kind, layer.adapter.keys, layer.adapter.values, sliding=sliding)
    make = _layer_with_state()
    states = entry.number_of_states
    return make(kind, layer.adapter.keys, layer.adapter.values, sliding=sliding, number_of_states=states)


@functools.cache
def _layer_with_state() -> Any:
    """The class of layers with attention and a state side by side; made at first use, as few models need it."""
    from transformers.cache_utils import LinearAttentionLayer

    class StatefulSinkLayer(SinkLayer, LinearAttentionLayer):
        """Keys and values in rings, the state as in transformers (which finds state layers by their class)."""

        def __init__(
            self,
            kind: LayerKind,
            key_rotation: Rotation | None,
            value_rotation: Rotation | None = None,
            *,
            sliding: bool = False,
            number_of_states: int = 1,
        ):
            LinearAttentionLayer.__init__(self, **state_arguments(number_of_states))
            SinkLayer.__init__(self, kind, key_rotation, value_rotation, sliding=sliding)

        def select_rows(self, rows: torch.Tensor) -> None:
            SinkLayer.select_rows(self, rows)
            LinearAttentionLayer.reorder_cache(self, rows)  # type: ignore[arg-type]

        def reset(self) -> None:
            SinkLayer.reset(self)
            # not `LinearAttentionLayer.reset`, which keeps states for so many rows
            LinearAttentionLayer.__init__(self, **state_arguments(getattr(self, "number_of_states", 1)))

    return StatefulSinkLayer
