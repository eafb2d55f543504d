"""A naive sink cache for any model: it keeps every token of every layer, and selects what each forward sees.

It shares with the product only the adapters, which the probe has checked against the model; it has no ring, no walking
sinks and no clock. Each forward selects tokens by the four rules (sink_patch/README.md), rotates each key in float64
from the position at which the model computed it to the one at which it is seen, and numbers positions from 0.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from sink_patch.compat import installed_shim
from sink_patch.models.entries import cache_argument, own_layers, text_config
from sink_patch.models.examine import examine
from tests.support.caches import BareCache


class ReplayCache(BareCache):
    """One row, no padding.

    Args:
        sight: what a forward sees where images leave whole (tests/support/media/oracle.py); None: there are none.
    """

    def __init__(self, model: nn.Module, window_length: int, num_sink_tokens: int, sight: Any = None):
        super().__init__(layers=list(own_layers(text_config(model))))
        facts = examine(model)
        self.facts, self.window, self.sinks, self.sight = facts.layers, window_length, num_sink_tokens, sight
        self.counts_columns, self.explicit_mask = facts.position_source == "columns", facts.explicit_mask
        self.kept: dict[int, list[tuple[torch.Tensor, torch.Tensor, int]]] = {}  # layer -> (key, value, position made)
        self.index_keys: dict[int, list[torch.Tensor]] = {}
        self.seen = self.new = 0

    def start(self, new: int) -> dict[str, Any]:
        """The arguments of the model for a forward of `new` tokens."""
        self.new = new
        start, columns = len(self.full_past()), torch.arange(self.past_columns(), self.past_columns() + new)
        explicit = self.explicit_mask
        mask = {"attention_mask": torch.ones(1, len(columns) + int(columns[0]), dtype=torch.long)} if explicit else {}
        # coordinates of the mask, for versions up to 5.3
        coordinates = {"cache_position": columns} if installed_shim().passes_cache_position else {}
        positions = {} if self.counts_columns else {"position_ids": torch.arange(start, start + new)[None]}
        return {**positions, **mask, **coordinates}

    def past_columns(self) -> int:
        """Mask coordinate of the first new token: the number of past tokens in the layer that sees the most."""
        attention = [index for index, facts in enumerate(self.facts) if facts.entry.attention]
        return max((len(self.past(index)) for index in attention), default=0)

    def full_past(self) -> list[int]:
        """Absolute indices that a layer with sinks sees, by the four rules."""
        seen, new = self.seen, self.new
        if self.sight is not None:
            return [index for index in self.sight.visible(seen, new) if index < seen]
        if seen + new <= self.window:
            return list(range(seen))
        sinks = min(seen, self.sinks)
        recent = max(0, self.window - sinks - new) if new <= self.window - self.sinks else 0
        return [*range(sinks), *range(seen - recent, seen)] if seen else []

    def past(self, layer_idx: int) -> list[int]:
        own = self.facts[layer_idx].entry.sliding_window
        if own is not None and own < self.window:
            return list(range(max(0, self.seen - own + 1), self.seen))
        return self.full_past()

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        kept, past = self.kept.setdefault(layer_idx, []), self.past(layer_idx)
        start = len(self.full_past())  # position of the first new token
        keys, values = [], []
        for place, index in enumerate(past):
            key, value, made = kept[index]
            position = start - len(past) + place
            keys.append(self._turned(key, self.facts[layer_idx].adapter.keys, position - made))
            values.append(self._turned(value, self.facts[layer_idx].adapter.values, position - made))
        for column in range(key_states.shape[2]):
            part = slice(column, column + 1)
            kept.append((key_states[:, :, part], value_states[:, :, part], start + column))
        return torch.cat([*keys, key_states], dim=2), torch.cat([*values, value_states], dim=2)

    def update_indexer(self, indexer_key_states, layer_idx):
        """The keys of the visible tokens, not rotated: the indexer selects all tokens, whatever their keys are."""
        kept = self.index_keys.setdefault(layer_idx, [])
        past = [kept[index] for index in self.past(layer_idx)]
        kept += indexer_key_states.split(1, dim=1)
        return torch.cat([*past, indexer_key_states], dim=1)

    @staticmethod
    def _turned(states: torch.Tensor, rotation: Any, delta: int) -> torch.Tensor:
        if rotation is None:
            return states
        half = rotation.rotary_dim // 2
        turned, angles = states.double(), rotation.sign * rotation.inv_freq * delta
        first = (
            torch.arange(half) + rotation.start
            if rotation.pairing == "half"
            else 2 * torch.arange(half) + rotation.start
        )
        second = first + (half if rotation.pairing == "half" else 1)
        a, b = turned[..., first].clone(), turned[..., second].clone()
        turned[..., first] = a * angles.cos() - b * angles.sin()
        turned[..., second] = b * angles.cos() + a * angles.sin()
        return turned.to(states.dtype)

    def finish(self) -> None:
        self.seen += self.new

    def crop(self, count: int) -> None:
        """Remove the newest `count` tokens."""
        self.seen -= count
        for kept in (*self.kept.values(), *self.index_keys.values()):
            del kept[len(kept) - count :]

    def get_seq_length(self, layer_idx: int = 0, *args: Any) -> int:
        return self.past_columns()

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.past_columns()

    def get_mask_sizes(self, query: Any, layer_idx: int) -> tuple[int, int]:
        """(length, offset); `query` is the number of new tokens, or up to 5.3 their coordinates."""
        new = query if isinstance(query, int) else len(query)
        past = len(self.past(self._attention(layer_idx)))
        return past + new, self.past_columns() - past

    @property
    def is_initialized(self) -> bool:
        """Whether it holds anything: some models see by that whether a prompt is a first one."""
        return self.seen > 0

    @property
    def is_sliding(self) -> list[bool]:
        return [facts.entry.sliding_window is not None for facts in self.facts]

    def _attention(self, layer_idx: int) -> int:
        order = [*range(layer_idx, len(self.facts)), *range(layer_idx)]
        return next(index for index in order if self.facts[index].entry.attention)


@torch.no_grad()
def replayed(
    model: nn.Module, stream: torch.Tensor, schedule: list[int], window: int, sinks: int
) -> list[torch.Tensor]:
    """The last logits of each forward of the schedule, [1, vocab]."""
    cache, logits, start = ReplayCache(model, window, sinks), [], 0
    name = cache_name(model)
    for new in schedule:
        extra = named_inputs(model, cache.start(new))
        logits.append(model(stream[:, start : start + new], use_cache=True, **{name: cache}, **extra).logits[:, -1])
        cache.finish()
        start += new
    return logits


def named_inputs(model: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    """Those arguments that the forward of a model takes."""
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return {key: given[key] for key in given if key in parameters or (takes_any and key != "cache_position")}


def cache_name(model: nn.Module) -> str:
    return cache_argument(model)
