"""A layer with attention and a recurrent or convolution state side by side: ours, and transformers' own."""

from __future__ import annotations

import torch
from transformers.cache_utils import LinearAttentionLayer

from sink_patch.buffers.layers import SinkLayer
from sink_patch.buffers.rotation import Rotation
from sink_patch.rules.kinds import LayerKind


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
        several = {"number_of_states": number_of_states} if number_of_states != 1 else {}  # not in all versions
        LinearAttentionLayer.__init__(self, **several)
        SinkLayer.__init__(self, kind, key_rotation, value_rotation, sliding=sliding)

    def select_rows(self, rows: torch.Tensor) -> None:
        SinkLayer.select_rows(self, rows)
        LinearAttentionLayer.reorder_cache(self, rows)  # type: ignore[arg-type]

    def reset(self) -> None:
        SinkLayer.reset(self)
        LinearAttentionLayer.reset(self)
