"""What one token leaves in each layer of a cache: shapes and dtypes, read off transformers' own cache.

No config says them for all models: latent caches, layers that share keys, quantised weights and tensor parallel each
have their own. One forward of the model says them for any.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sink_patch.compat import Cached, Entry, installed_shim
from sink_patch.models.entries import text_config
from sink_patch.models.facts import ModelFacts
from sink_patch.models.probe.calls import probe_tokens, run

_STATES = ("conv_states", "recurrent_states")  # of a layer of transformers: [rows, ...], or several by number


@dataclass(frozen=True, eq=False)
class Sample:
    """One token of one row in one layer; the tensors are on the meta device, so they have no data.

    Args:
        keys, values: [1, heads, 1, dim] each; None where the layer holds none, or another process has it.
        states: recurrent and convolution states, [1, ...] each.
    """

    keys: torch.Tensor | None
    values: torch.Tensor | None
    states: tuple[torch.Tensor, ...] = ()


def sample(model: nn.Module, facts: ModelFacts) -> list[Sample]:
    """One for each layer of `facts`; costs one forward of one token in each of a few rows."""
    cache = installed_shim().probe_cache(text_config(model))
    if not any(layer.entry.attention for layer in facts.layers):
        # transformers raises there, as its caches read the length off a layer with attention; nothing was read yet
        cache.get_seq_length = lambda *_, **__: 0
        cache.get_mask_sizes = lambda *_, **__: (1, 0)  # of one token
    run(model, probe_tokens(model), None, cache)
    return read_cache(cache, facts)


def read_cache(cache: Any, facts: ModelFacts) -> list[Sample]:
    """The same of a cache of transformers' own that a model has filled, on any device."""
    cached = list(installed_shim().cached(cache))
    cached += [None] * (len(facts.layers) - len(cached))  # a cache may grow only as far as it is used
    entries = [layer.entry for layer in facts.layers]
    own = cache.layers if facts.has_states else [None] * len(entries)
    return [_sample(*one) for one in zip(entries, cached, own, strict=True)]


def _sample(entry: Entry, cached: Cached, own: Any) -> Sample:
    keys, values = (None, None) if cached is None or not entry.attention else map(_of_one_token, cached)
    if not entry.state:
        return Sample(keys, values)
    states = _tensors([getattr(own, name, None) for name in _STATES])
    return Sample(keys, values, tuple(state[:1].to("meta") for state in states))


def _of_one_token(states: torch.Tensor) -> torch.Tensor:
    return states[:1, :, :1].to("meta")  # [1, heads, 1, dim]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """A layer has one state of a kind, several by number, or none."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        several: Sequence[Any] = list(value.values()) if isinstance(value, Mapping) else value
        for one in several:
            yield from _tensors(one)
