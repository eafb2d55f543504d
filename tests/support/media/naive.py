"""Naive caches for models whose images are no columns like any others.

Where positions have several coordinates, tokens stay where the model has put them. Where images see themselves in both
directions, masks are written entry by entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tests.support.media.oracle import Sight
from tests.support.replay import ReplayCache


class Places:
    """Where the tokens of one row stand, as the model itself says in a forward over the whole stream.

    Args:
        coordinates: [3, tokens].
        of_image: which tokens belong to images, [tokens].
    """

    def __init__(self, coordinates: torch.Tensor, of_image: Sequence[bool]):
        self.coordinates, self.of_image = coordinates, of_image
        self.begins = [  # of each token, where it stands, or where its image begins
            next(place for place in range(index, -1, -1) if place == 0 or not (of_image[place] and of_image[place - 1]))
            for index in range(len(of_image))
        ]

    def of(self, kept: Sequence[int], sinks: int) -> torch.Tensor:
        """Where tokens stand in the cache, [3, kept]: the sinks just before what is behind them."""
        held = min(sinks, len(kept))
        found = self.coordinates[:, list(kept)].clone()
        if kept[-1] != len(kept) - 1:
            behind = int(self.coordinates[:, self.begins[kept[held]]].min())
            found[:, :held] += max(0, behind - int(found[:, :held].max()) - 1) if held else 0
        return found


class PlacedCache(ReplayCache):
    """One row, no padding, no sliding windows; it turns the sinks in float64, and nothing else."""

    def __init__(self, model: nn.Module, window_length: int, num_sink_tokens: int, places: Places):
        sight = Sight(places.of_image, window_length, num_sink_tokens)
        super().__init__(model, window_length, num_sink_tokens, sight)
        self.places = places

    def start(self, new: int) -> dict[str, Any]:
        given = super().start(new)
        return {**given, "position_ids": self.places.coordinates[:, None, self.seen : self.seen + new]}

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        kept, past = self.kept.setdefault(layer_idx, []), self.past(layer_idx)
        sees = [*past, *range(self.seen, self.seen + self.new)]
        moved = (self.places.of(sees, self.sinks) - self.places.coordinates[:, sees])[0].tolist()
        rotation = self.facts[layer_idx].adapter.keys
        keys = [self._turned(kept[index][0], rotation, delta) for index, delta in zip(past, moved, strict=False)]
        values = [kept[index][1] for index in past]
        for column in range(key_states.shape[2]):
            part = slice(column, column + 1)
            kept.append((key_states[:, :, part], value_states[:, :, part], 0))
        return torch.cat([*keys, key_states], dim=2), torch.cat([*values, value_states], dim=2)


def written_masks(
    naive: ReplayCache, new: int, blocks: Sequence[int | None], *, beyond: bool = False, **by_kind: Sequence[int | None]
) -> dict[str, torch.Tensor]:
    """The masks of a forward of so many new tokens, which has begun, [1, 1, new, visible] for each kind of layer.

    Args:
        blocks: of each new token, which of those that see each other it belongs to; None: to none.
        beyond: whether they see each other beyond sliding windows.
        by_kind: `blocks` for a kind of layer alone.
    """
    found = dict[str, torch.Tensor]()
    for layer, facts in enumerate(naive.facts):
        window, kind = facts.entry.sliding_window, str(facts.entry.layer_type)
        if kind in found:
            continue
        of_kind = by_kind.get(kind, blocks)
        sees = [*naive.past(layer), *range(naive.seen, naive.seen + new)]
        mask = torch.full((1, 1, new, len(sees)), torch.finfo(torch.float32).min)
        for query in range(new):
            for place, key in enumerate(sees):
                own = None if key < naive.seen else of_kind[key - naive.seen]
                together = own is not None and own == of_kind[query]
                near = window is None or naive.seen + query - key < window
                if (near and key <= naive.seen + query) or (together and (near or beyond)):
                    mask[0, 0, query, place] = 0
        found[kind] = mask
    return found
