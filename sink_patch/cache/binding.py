"""What ties a cache to a model: the layers, the rules and the hooks, once the model has been examined."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from sink_patch.arguments import TURNS, Ids, Sizes
from sink_patch.buffers.store import LayerStore
from sink_patch.cache.transformers_cache import TransformersCache
from sink_patch.errors import CacheStateError, SinkArgumentError
from sink_patch.models.entries import text_config
from sink_patch.models.examine import examine
from sink_patch.models.facts import ModelFacts
from sink_patch.models.horizon import horizon
from sink_patch.models.layers import make_layers
from sink_patch.streaming.hooks import entrances, install
from sink_patch.streaming.steps.planning import Planner
from sink_patch.streaming.streams import Streams


def bind(cache: TransformersCache, model: nn.Module, facts: ModelFacts | None = None) -> None:
    """Tie a cache to a model, unless it is: empty streams of it, and hooks on its forward.

    Args:
        facts: what `examine` has found out about the model; None: find out.

    Raises:
        UnsupportedModelError: the model cannot stream; neither the cache nor the model is changed.
        SinkArgumentError: the window does not fit the model's positions.
        CacheStateError: the cache holds the tokens of another model.
    """
    if not cache.is_bound_to(model):
        check_holds_nothing(cache, model)
        tie(cache, new_streams(model, cache.sizes, facts), model)


def tie(cache: TransformersCache, streams: Streams, model: nn.Module) -> None:
    """Give a cache the streams of a model, and let the model's forward know sink caches."""
    cache._streams, cache.layers = streams, list(streams.store.layers)
    install(model)


def new_streams(model: nn.Module, sizes: Sizes, facts: ModelFacts | None = None) -> Streams:
    """Empty streams of a model; the model is not changed.

    Args:
        facts: as for `bind`.

    Raises:
        UnsupportedModelError: the model cannot stream.
        SinkArgumentError: the window does not fit the model's positions, or it has no such ids.
    """
    if sizes.evict == TURNS:
        check_ids(model, "turn_start", sizes.turn_start)
    facts = examine(model) if facts is None else facts
    clock = horizon(facts, sizes.window_length, sizes.num_sink_tokens)
    store = LayerStore(make_layers(facts, text_config(model), sizes))
    return Streams(Planner(sizes, clock, facts), store, entrances(model))


def check_ids(model: nn.Module, name: str, runs: Sequence[Ids]) -> None:
    """Refuse runs of ids, of the setting `name`, that are not of the model's vocabulary.

    Raises:
        SinkArgumentError: some are not.
    """
    size = getattr(text_config(model), "vocab_size", None)
    unknown = sorted({token for run in runs for token in run if size is not None and token >= size})
    if unknown:
        raise SinkArgumentError(
            f"Unknown ids: {name} holds {', '.join(map(str, unknown))}, and {type(model).__name__} has a vocabulary of "
            f"{size} tokens. Pass the ids that the tokenizer of this model gives."
        )


def check_holds_nothing(cache: TransformersCache, model: nn.Module) -> None:
    """Refuse to give the tokens of one model to another.

    Raises:
        CacheStateError: the cache belongs to another model, and is not empty.
    """
    if cache.is_initialized and not cache.is_bound_to(model):
        raise CacheStateError(
            f"{cache!r} holds the tokens of another model than this {type(model).__name__}. Use a new SinkCache, or "
            "reset() this one first."
        )
