"""What ties a cache to a model: the layers, the rules and the hooks, once the model has been examined."""

from __future__ import annotations

from torch import nn

from sink_patch.arguments import Sizes
from sink_patch.buffers.store import LayerStore
from sink_patch.models.entries import text_config
from sink_patch.models.examine import examine
from sink_patch.models.facts import ModelFacts
from sink_patch.models.horizon import horizon
from sink_patch.models.layers import make_layers
from sink_patch.streaming.hooks import entrances, install
from sink_patch.streaming.planning import Planner
from sink_patch.streaming.streams import Streams


def new_streams(model: nn.Module, sizes: Sizes, facts: ModelFacts | None = None) -> Streams:
    """Empty streams of a model; the model is not changed (`install` puts the hooks on it).

    Args:
        facts: what `examine` has found out about the model; None: find out.

    Raises:
        UnsupportedModelError: the model cannot stream.
        SinkArgumentError: the window does not fit the model's positions.
    """
    facts = examine(model) if facts is None else facts
    clock = horizon(facts, sizes.window_length, sizes.num_sink_tokens)
    store = LayerStore(make_layers(facts, text_config(model), sizes))
    return Streams(Planner(sizes, clock, facts), store, entrances(model))


__all__ = ["install", "new_streams"]
