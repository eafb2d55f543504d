"""One layer of a `SinkCache`: rings for its keys and values; and what any layer of the cache holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sink_patch.buffers.layouts import Layout
from sink_patch.buffers.rings import Ring
from sink_patch.buffers.rotation import Rotation, Turn
from sink_patch.errors import CacheStateError
from sink_patch.rules.kinds import LayerKind

_FROM_THE_MODEL = frozenset({"kind", "kind_index", "rings", "is_sliding"})  # in our layers
OF_THE_BATCH = "max_batch_size"  # which some layers of states have, and nothing reads
Held = dict[str, Any]


class SinkLayer:
    """Keys and values of one layer, as transformers' caches have them in `layers` (cache_utils.py).

    Args:
        kind: how many tokens it holds, and how many of them are sinks.
        key_rotation, value_rotation: how the cached tensors turn with position; None: they do not.
        sliding: whether the model gives this layer the mask of a sliding window.
    """

    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(
        self,
        kind: LayerKind,
        key_rotation: Rotation | None,
        value_rotation: Rotation | None = None,
        sliding: bool = False,
    ):
        self.kind = kind
        self.kind_index = 0  # its place among the kinds of the cache (store.py)
        self.is_sliding = sliding
        self.rings = (Ring(key_rotation), Ring(value_rotation))

    def __repr__(self) -> str:
        local = ", local" if self.kind.local else ""
        return f"SinkLayer(capacity={self.kind.capacity}, num_sink_tokens={self.kind.num_sink_tokens}{local})"

    def get_max_cache_shape(self) -> int:
        """-1, as of a `DynamicLayer`: there is no length at which a stream ends."""
        return -1

    @property
    def keys(self) -> torch.Tensor | None:
        """The key buffer, [rows, heads, slots, head_dim], in ring order."""
        return self.rings[0].buffer

    @property
    def values(self) -> torch.Tensor | None:
        """The value buffer, [rows, heads, slots, head_dim], in ring order."""
        return self.rings[1].buffer

    @property
    def is_initialized(self) -> bool:
        return self.keys is not None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layouts: Sequence[Layout]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store [rows, heads, columns, head_dim] and return the keys and values that this forward attends to.

        Args:
            layouts: of the forward, one for each kind of layer.

        Raises:
            CacheStateError: the states are not of so many tokens as the forward.
        """
        keys, values = self.rings
        layout = layouts[self.kind_index]
        slot, held, held_values = layout.slot, keys.buffer, values.buffer
        if slot is not None and held is not None and held_values is not None:
            try:  # `suppress` takes as long as half a copy
                return held.index_copy_(2, slot, key_states), held_values.index_copy_(2, slot, value_states)
            except (RuntimeError, IndexError):  # another dtype than before (autocast), another device, more columns
                pass
        if key_states.shape[2] != layout.columns:
            raise CacheStateError(f"A layer has {key_states.shape[2]} tokens in a forward of {layout.columns}.")
        return keys.update(key_states, layout), values.update(value_states, layout)

    def take_all_slots(self) -> None:
        for ring in self.rings:
            ring.take_all_slots(self.kind)

    def turn(self, turn: Turn) -> None:
        """Turn what is cached."""
        for ring in self.rings:
            ring.turn(turn, self.kind)

    def lay_out(self, kind: LayerKind, seen: Sequence[int]) -> None:
        """Take on a kind with another number of spare slots; rows count `seen` tokens."""
        for ring in self.rings:
            ring.lay_out(self.kind, kind, seen)
        self.kind = kind

    def move_to_front(self, before: Sequence[int], after: Sequence[int]) -> None:
        """Number the newest tokens behind the sinks anew: rows had seen `before` tokens, and count `after` now."""
        for ring in self.rings:
            ring.move_to_front(self.kind, before, after)

    def select_rows(self, rows: torch.Tensor) -> None:
        for ring in self.rings:
            ring.select_rows(rows)

    def reset(self) -> None:
        for ring in self.rings:
            ring.reset()


def attributes_of(layer: Any) -> Held:
    """What a layer holds beside rings and what it has from the model: states."""
    return {name: held for name, held in vars(layer).items() if name not in _FROM_THE_MODEL}


def described(layer: Any) -> Held:
    """How a layer holds what it holds, without rows and slots."""
    states = {name: _shape_of(held) for name, held in attributes_of(layer).items() if name != OF_THE_BATCH}
    if not isinstance(layer, SinkLayer):
        return states
    named = {"keys": layer.keys, "values": layer.values}
    return states | {name: _shape_of(held[:, :, 0]) for name, held in named.items() if held is not None}


def _shape_of(held: Any) -> Any:
    if isinstance(held, torch.Tensor):
        return f"{held.dtype} {list(held.shape[1:])} on {held.device}"
    return {key: _shape_of(one) for key, one in held.items()} if isinstance(held, dict) else held
