"""Keys in pages, turned: sinks before each batch, in one copy of all requests, and rings where clocks go back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sink_patch.batching.models import Group
from sink_patch.batching.pages import key_rows, places_in
from sink_patch.batching.slots.streams import Stream
from sink_patch.buffers.devices import on_device
from sink_patch.buffers.rotation import Rotation
from sink_patch.rules.plans import RowPlan


@dataclass(frozen=True, eq=False)
class Planned:
    """A request in the next batch."""

    request_id: str
    stream: Stream
    plan: RowPlan


@dataclass(frozen=True, eq=False)
class Turning:
    """Layers of one allocator that turn alike.

    Args:
        allocator: which has their pages.
        slots: how many a request has there; the first `sinks` of them are not in its ring.
        rotation: how their keys turn.
        layers: rows between the keys of the first layer and theirs, [layers, 1].
        rows: all keys and values, [rows, heads, dim].
    """

    allocator: Any
    slots: int
    sinks: int
    rotation: Rotation
    layers: torch.Tensor
    rows: torch.Tensor

    def set_back(self, request_id: str, turn: int) -> None:
        """Turn the ring of a request back by so many positions."""
        held = len(self.allocator.block_table[request_id]) * self.allocator.tokens_per_page
        index = self._index([request_id], self.sinks, min(self.slots, held))[0]  # [layers * slots]
        keys = self.rows[index].transpose(0, 1)[None]  # [1, heads, layers * slots, dim]
        turned = self.rotation.apply(keys, self.rotation.cos_sin(-turn, keys.device))
        self.rows.index_copy_(0, index, turned[0].transpose(0, 1))

    def pristine(self, request_id: str) -> torch.Tensor:
        """A copy of the sinks of a request, [layers * sinks, heads, dim]."""
        return self.rows[self._index([request_id], 0, self.sinks)[0]]

    def show(self, moving: Sequence[Planned], which: int) -> None:
        """Turn the sinks of requests to where the next batch sees them.

        Args:
            which: of the pristine sinks of a request are those of these layers.
        """
        pristine = torch.stack([one.stream.pristine[which] for one in moving])  # [requests, layers * sinks, heads, dim]
        turns = on_device([one.plan.sink_turn for one in moving], pristine.device)  # [requests]
        states = pristine.transpose(1, 2)  # [requests, heads, layers * sinks, dim]
        turned = self.rotation.apply(states, self.rotation.cos_sin(turns, states.device)).transpose(1, 2)
        index = self._index([one.request_id for one in moving], 0, self.sinks)  # [requests, layers * sinks]
        self.rows.index_copy_(0, index.flatten(), turned.flatten(0, 1))

    def _index(self, requests: Sequence[str], first: int, last: int) -> torch.Tensor:
        """Rows of the keys of these layers in slots of requests, [requests, layers * slots]."""
        places = [places_in(self.allocator, one, [(first, last - first)]) for one in requests]
        found = on_device(places, self.rows.device)[:, None]  # [requests, 1, slots]
        return (found + self.layers).flatten(1)


def turnings(allocator: Any, group: Group) -> list[Turning]:
    """One for each rotation among the layers of an allocator."""
    rows, found = key_rows(allocator), dict[int, list[int]]()
    for index, rotation in enumerate(group.rotations):
        if rotation is not None:
            found.setdefault(id(rotation), []).append(index)
    kind = group.kind
    made = []
    for indices in found.values():
        rotation = group.rotations[indices[0]]
        layers = on_device([[2 * index * allocator.tokens_per_page] for index in indices], rows.device)
        if rotation is not None:
            made.append(Turning(allocator, kind.slots, kind.num_sink_tokens, rotation, layers, rows))
    return made


class Turner:
    """Turns all keys that are to turn before a batch.

    Args:
        turning: all layers that turn.
    """

    def __init__(self, turning: Sequence[Turning]):
        self._all = tuple(turning)
        self._with_sinks = tuple(one for one in turning if one.sinks)

    def turn(self, batch: Sequence[Planned]) -> None:
        """Set clocks back where that is due, and show the sinks.

        Everything is asked of the device in order, so that the stream of torch on which the model runs must be the
        current one.
        """
        for one in batch:
            if one.plan.turn:
                for turning in self._all:
                    turning.set_back(one.request_id, one.plan.turn)
        moving = [one for one in batch if one.plan.sink_turn != one.stream.shown]
        if not moving or not self._with_sinks:
            return
        for one in moving:
            if not one.stream.pristine:
                one.stream.pristine = [turning.pristine(one.request_id) for turning in self._with_sinks]
        for which, turning in enumerate(self._with_sinks):
            turning.show(moving, which)
        for one in moving:
            one.stream.shown = one.plan.sink_turn
