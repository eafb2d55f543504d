"""All layers of a cache: what is done to all of them at once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sink_patch.buffers.layers import OF_THE_BATCH, Held, SinkLayer, attributes_of, described
from sink_patch.buffers.rings import Ring, stacked
from sink_patch.buffers.rotation import Turn
from sink_patch.buffers.sinks.owner import Sinks
from sink_patch.rules.kinds import LayerKind
from sink_patch.rules.rows import Row, Slots


@dataclass(frozen=True)
class Joined:
    """What layers will hold when the rows of others stand below their own: rings, and attributes of states."""

    buffers: Sequence[tuple[Ring, torch.Tensor | None]]
    pristine: Sequence[tuple[Ring, torch.Tensor]]
    states: Sequence[tuple[Any, Held]]


class LayerStore:
    """The layers of a cache, their kinds, and their sinks.

    `kinds` are the different kinds of layers, in the order in which they come; `slots` how many slots they have;
    `are_sliding` of each layer, whether the model gives it the mask of a sliding window; `of_states_alone` whether it
    holds a recurrent or convolution state and no attention.

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
        self.are_sliding = tuple(getattr(layer, "is_sliding", False) for layer in layers)
        self.of_states_alone = tuple(not isinstance(layer, SinkLayer) for layer in layers)
        self._attending = tuple(self._find_attending(number) for number in range(len(layers)))
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
        return self._attending[layer_idx if layer_idx < len(self._attending) else 0]

    def _find_attending(self, layer_idx: int) -> SinkLayer | None:
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
        """Bring tokens to the slots that they have once whole messages or images have left the rows."""
        for layer in self.sink_layers:
            layer.move_to_front(*([layer.kind.count(row) for row in rows] for rows in (before, after)))

    def select_rows(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, in that order."""
        for layer in self.sink_layers:
            layer.select_rows(indices)
        self.sinks.select_rows(indices)
        for layer in self._other_layers:
            layer.reorder_cache(indices)

    def difference(self, other: LayerStore) -> str | None:
        """What the layers hold in another way than those of `other`, such as another dtype; None: nothing."""
        for index, (one, two) in enumerate(zip(self.layers, other.layers, strict=True)):
            mine, theirs = described(one), described(two)
            for name in sorted(mine.keys() & theirs.keys()):
                if mine[name] != theirs[name]:
                    return f"{name} of layer {index}: {mine[name]} here, {theirs[name]} there"
        return None

    def joined(self, other: LayerStore, rows: tuple[int, int]) -> Joined:
        """What these layers will hold with the rows of `other` below theirs (`rows`: how many here and there).

        In new tensors; nothing changes yet.
        """
        layers = zip(self.sink_layers, other.sink_layers, strict=True)
        rings = [pair for one, two in layers for pair in zip(one.rings, two.rings, strict=True)]
        pairs = [(one, self.sinks.pristine_of(one), other.sinks.pristine_of(two)) for one, two in rings]
        pristine = [(ring, stacked(upper, lower, rows)) for ring, upper, lower in pairs]
        return Joined(
            buffers=[(one, stacked(one.buffer, two.buffer, rows)) for one, two in rings],
            pristine=[(ring, sinks) for ring, sinks in pristine if sinks is not None],
            states=[
                (one, _joined_states(attributes_of(one), attributes_of(two), rows))
                for one, two in zip(self.layers, other.layers, strict=True)
            ],
        )

    def take(self, joined: Joined) -> None:
        """Hold that from now on."""
        for ring, buffer in joined.buffers:
            ring.replace(buffer)
        for ring, sinks in joined.pristine:
            self.sinks.put(ring, sinks)
        for layer, states in joined.states:
            vars(layer).update(states)

    def reset(self) -> None:
        """Forget all tokens. Layers of which some were laid out anew and others not get the same slots again."""
        for layer in self.sink_layers:
            layer.reset()
        for layer, fresh in zip(self._other_layers, self._fresh, strict=True):
            vars(layer).clear()  # their own `reset` keeps states for so many rows
            vars(layer).update(copy.deepcopy(fresh))
        self.sinks.reset()
        self.lay_out(self.slots.spare, ())


def _joined_states(upper: Held, lower: Held, rows: tuple[int, int]) -> Held:
    """The attributes of a layer of states with rows of another below its own; those of that one, where it has none."""
    if not rows[0]:
        return {name: _copied(held) for name, held in lower.items()}
    joined = {name: _below(held, lower[name]) for name, held in upper.items()}
    return joined | ({OF_THE_BATCH: sum(rows)} if OF_THE_BATCH in upper else {})


@torch.inference_mode(False)  # else they could not be written to outside it
def _below(upper: Any, lower: Any) -> Any:
    """States [rows, ...], one or a dict of several."""
    if isinstance(upper, dict):
        return {key: _below(one, lower[key]) for key, one in upper.items()}
    return torch.cat((upper.detach(), lower.detach())) if isinstance(upper, torch.Tensor) else upper


def _copied(held: Any) -> Any:
    """The same states alone."""
    if isinstance(held, dict):
        return {key: _copied(one) for key, one in held.items()}
    return _below(held, held[:0]) if isinstance(held, torch.Tensor) else held
