"""All layers of a cache: what is done to all of them at once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from sink_patch.buffers.layers import SinkLayer
from sink_patch.buffers.rotation import Turn
from sink_patch.buffers.sinks import Sinks
from sink_patch.rules.kinds import LayerKind
from sink_patch.rules.rows import Row, Slots


class LayerStore:
    """The layers of a cache, their kinds, and their sinks.

    `kinds` are the different kinds of layers, in the order in which they come; `slots` how many slots they have.

    Args:
        layers: ours (`SinkLayer`), and transformers' own where a layer holds a recurrent state alone, or nothing.
    """

    kinds: list[LayerKind]
    slots: Slots

    def __init__(self, layers: Sequence[Any]):
        self.layers = tuple(layers)
        self.sink_layers = tuple(layer for layer in layers if isinstance(layer, SinkLayer))
        self._other_layers = tuple(layer for layer in layers if not isinstance(layer, SinkLayer))
        self._fresh = tuple(copy.deepcopy(vars(layer)) for layer in self._other_layers)
        with_sinks = [layer for layer in self.sink_layers if layer.kind.num_sink_tokens]
        self.sinks = Sinks([ring for layer in with_sinks for ring in layer.rings if ring.rotation is not None])
        self.note_kinds()

    def note_kinds(self) -> None:
        """Look at the kinds of the layers, which change with the number of spare slots."""
        self.kinds = list(dict.fromkeys(layer.kind for layer in self.sink_layers))
        for layer in self.sink_layers:
            layer.kind_index = self.kinds.index(layer.kind)
        fewest = min((kind.slots for kind in self.kinds), default=0)
        spare = min((kind.spare for kind in self.kinds), default=0)
        self.slots = Slots(fewest, spare, local=any(kind.local for kind in self.kinds))

    def attending_layer(self, layer_idx: int) -> SinkLayer | None:
        """The first layer with attention from `layer_idx` on, else the first of all; None: all hold states alone.

        Models without full or sliding attention in layer 0 ask for the mask of layer 0 all the same.
        """
        behind = (*self.layers[layer_idx:], *self.layers)
        for layer in behind:  # no `next` with a default, as in hooks.py
            if isinstance(layer, SinkLayer):
                return layer
        return None

    @property
    def nbytes(self) -> int:
        """Bytes of all keys, values and pristine sinks."""
        buffers = [ring.buffer for layer in self.sink_layers for ring in layer.rings]
        return self.sinks.nbytes + sum(buffer.nbytes for buffer in buffers if buffer is not None)

    def devices(self) -> set[torch.device]:
        """Where keys lie."""
        return {layer.keys.device for layer in self.sink_layers if layer.keys is not None}

    def turn(self, turn: Turn) -> None:
        """Turn the keys of all rings."""
        for layer in self.sink_layers:
            layer.turn(turn)

    def take_all_slots(self) -> None:
        """Let all buffers have the size and the place that they keep."""
        for layer in self.sink_layers:
            layer.take_all_slots()
        self.sinks.bring_side_by_side()

    def lay_out(self, spare: int, rows: Sequence[Row]) -> None:
        """Have so many spare slots."""
        for layer in self.sink_layers:
            layer.lay_out(replace(layer.kind, spare=spare), [layer.kind.count(row) for row in rows])
        self.note_kinds()

    def move_to_front(self, before: Sequence[Row], after: Sequence[Row]) -> None:
        """Bring tokens to the slots that they have once whole messages have left the rows."""
        for layer in self.sink_layers:
            layer.move_to_front(*([layer.kind.count(row) for row in rows] for rows in (before, after)))

    def select_rows(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, in that order."""
        for layer in self.sink_layers:
            layer.select_rows(indices)
        self.sinks.select_rows(indices)
        for layer in self._other_layers:
            layer.reorder_cache(indices)

    def reset(self) -> None:
        """Forget all tokens. Layers of which some were laid out anew and others not get the same slots again."""
        for layer in self.sink_layers:
            layer.reset()
        for layer, fresh in zip(self._other_layers, self._fresh, strict=True):
            vars(layer).clear()  # their own `reset` keeps states for so many rows
            vars(layer).update(copy.deepcopy(fresh))
        self.sinks.reset()
        self.lay_out(self.slots.spare, ())
