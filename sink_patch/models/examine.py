"""What a model is to a sink cache: its family, adapters, layers and clock. Decided, and proven, before any stream."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

from torch import nn

from sink_patch.compat import Entry, installed_shim
from sink_patch.errors import SinkArgumentError, UnsupportedModelError
from sink_patch.models.adapters.adapter import Adapter, AdapterFactory
from sink_patch.models.adapters.rope import frequency_buffers
from sink_patch.models.entries import read_entries, text_config
from sink_patch.models.facts import LayerFacts, ModelFacts
from sink_patch.models.families.family import Family, OneByOne, PositionSource
from sink_patch.models.families.registry import find_family
from sink_patch.models.positions import Context, read_context
from sink_patch.models.probe import readings as probe

_proven: weakref.WeakKeyDictionary[nn.Module, ModelFacts] = weakref.WeakKeyDictionary()
_proving = threading.Lock()


def examine(model: nn.Module) -> ModelFacts:
    """Find out how a model streams, and prove it by the probe, which runs once for a model object.

    Raises:
        UnsupportedModelError: it cannot stream, with the reason; before anything is computed where the config tells.
        AdapterMismatchError: its cache does not turn as its family says.
    """
    family = _claimed(model)
    context = read_context(text_config(model), family)
    entries = read_entries(model)
    with _proving:
        known = _proven.get(model)
        if family is None and known is not None and known.family is None and _still_has(model, known):
            return known
        if family is None:
            facts = _facts(model, None, context, entries, _chosen(model, entries, context))
        else:
            facts = _proven_facts(model, family, context, entries, known)
        _proven[model] = facts
    return facts


def _proven_facts(
    model: nn.Module, family: Family, context: Context, entries: Sequence[Entry], known: ModelFacts | None
) -> ModelFacts:
    """With the adapters of the family, or with those that it had in earlier versions of transformers."""
    factories = [factory for factory in (family.adapters, family.formerly) if factory is not None]
    made = [_adapters(family, factory, model, len(entries)) for factory in factories]
    candidates = [_facts(model, family, context, entries, adapters) for adapters in made]
    for facts in candidates:
        if known is not None and facts.same_as(known):
            return facts
    if not any(entry.attention for entry in entries):
        return candidates[0]
    readings = probe.read(
        model, context.largest_probe_position, entries, positions=candidates[0].position_source == "position_ids"
    )
    for facts, adapters in zip(candidates[1:], made[1:], strict=True):
        if probe.fits(readings, entries, adapters):
            return facts
    probe.verify(readings, entries, made[0], family.name)
    return candidates[0]


def _facts(
    model: nn.Module, family: Family | None, context: Context, entries: Sequence[Entry], adapters: Sequence[Adapter]
) -> ModelFacts:
    source: PositionSource = "position_ids" if family is None else family.position_source_of(text_config(model))
    layers = tuple(
        LayerFacts(entry, adapter, source == "columns") for entry, adapter in zip(entries, adapters, strict=True)
    )
    return ModelFacts(
        model_class=type(model).__name__,
        model_type=text_config(model).model_type,
        family=None if family is None else family.name,
        layers=layers,
        context=context,
        position_source=source,
        one_by_one=_one_by_one(family, entries),
        explicit_mask=installed_shim().explicit_masks
        or source == "columns"
        or (family is not None and family.explicit_mask),
    )


def _one_by_one(family: Family | None, entries: Sequence[Entry]) -> OneByOne | None:
    if family is None or family.whole_prompts is None:
        return None
    windows = [entry.sliding_window for entry in entries if entry.sliding_window is not None]
    return OneByOne(family.whole_prompts, min(windows, default=0))


def horizon(facts: ModelFacts, window_length: int, num_sink_tokens: int) -> int:
    """RoPE position that the newest token must stay below, else the clock is set back.

    It is the context that the model was trained on, so that nothing that depends on absolute position ever sets in.
    Where the window fills more than half of that, it is 2 W, if the model has positions beyond its context that turn
    like those before.

    Raises:
        SinkArgumentError: the window does not fit.
    """
    length, limit = facts.context.length, facts.context.limit
    if limit is None:
        return length if 2 * window_length <= length else 2 * window_length
    if not any(layer.adapter.turns for layer in facts.layers):
        return _fitting(facts, window_length, limit, limit)  # nothing is ever rounded
    # each time the clock is set back, a key is rounded once more: leave room for at most two times in its life
    return _fitting(facts, window_length, max(1, (2 * limit + num_sink_tokens) // 3), limit)


def _fitting(facts: ModelFacts, window_length: int, largest: int, limit: int) -> int:
    if window_length > largest:
        raise SinkArgumentError(
            f"window_length={window_length} does not fit {facts.model_class}: it may use {limit} positions, as "
            f"{facts.context.why_limited}. Use window_length={largest} or less."
        )
    return limit


def _claimed(model: nn.Module) -> Family | None:
    """The model's family, once what the config alone tells is no obstacle."""
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_input_embeddings"):
        raise UnsupportedModelError(
            f"A {type(model).__name__} is not a transformers model, so there is no telling how its cache turns. Pass "
            "the transformers model itself."
        )
    name = f"{type(model).__name__} ({config.model_type})"
    if config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{name} cannot stream with attention sinks: it is an encoder-decoder model. Decoder-only models can."
        )
    if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise UnsupportedModelError(
            f"{name} caches nothing while it trains with gradient checkpointing. Call model.eval() first."
        )
    family = find_family(config)
    refusal = None if family is None else family.refusal
    refusal = refusal or installed_shim().own_cache(type(model))
    if refusal is not None:
        raise UnsupportedModelError(
            f"{name} cannot stream with attention sinks: {refusal}. Use another cache_implementation."
        )
    return family


def _adapters(family: Family, factory: AdapterFactory, model: nn.Module, num_layers: int) -> Sequence[Adapter]:
    adapters = factory(model)
    if len(adapters) != num_layers:
        raise UnsupportedModelError(
            f"The family {family.name!r} gave {len(adapters)} adapters for {type(model).__name__}, whose cache has "
            f"{num_layers} layers. Mend the family's function: one adapter for each layer."
        )
    return adapters


def _chosen(model: nn.Module, entries: Sequence[Entry], context: Context) -> Sequence[Adapter]:
    readings = probe.read(model, context.largest_probe_position, entries, positions=True)
    adapters = probe.choose(model, entries, readings)
    probe.check_distance_only(model, context.largest_probe_position)
    return adapters


def _still_has(model: nn.Module, facts: ModelFacts) -> bool:
    """Whether the frequencies that the probe chose are still the model's (a cast of the model rounds them)."""
    held = [buffer.double().cpu().tolist() for buffer in frequency_buffers(model).values()]
    rotations = [rotation for layer in facts.layers for rotation in (layer.adapter.keys, layer.adapter.values)]
    return all(rotation.inv_freq.tolist() in held for rotation in rotations if rotation is not None)
