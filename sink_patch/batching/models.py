"""Which models continuous batching can serve with sinks, and how transformers groups their layers."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sink_patch.arguments import Sizes
from sink_patch.buffers.rotation import Rotation
from sink_patch.compat import models as transformers_models
from sink_patch.errors import UnsupportedModelError
from sink_patch.models.cost.sample import Sample, sample
from sink_patch.models.entries import text_config
from sink_patch.models.facts import LayerFacts, ModelFacts
from sink_patch.rules.kinds import LayerKind


@dataclass(frozen=True, eq=False)
class Group:
    """Layers whose pages transformers gives out together.

    Args:
        kind: what each of them holds.
        rotations: how the keys of each of them turn, in their order; None: they do not.
    """

    kind: LayerKind
    rotations: tuple[Rotation | None, ...]


def groups_of(model: nn.Module, facts: ModelFacts, sizes: Sizes) -> Mapping[str, Group]:
    """The groups of a model that has been checked, by the name that transformers has for them."""
    groups = {}
    for name, indices in transformers_models.group_layers(text_config(model)).items():
        layers = [facts.layers[index] for index in indices]
        kind = layers[0].kind(sizes.window_length, sizes.num_sink_tokens)
        groups[name] = Group(kind, tuple(layer.adapter.keys for layer in layers))
    return groups


_samples: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Sequence[Sample]]] = weakref.WeakKeyDictionary()  # by dtype


def check_model(model: Any, facts: ModelFacts) -> None:
    """Refuse a model that would not be served exactly.

    Args:
        facts: of the model, proven.

    Raises:
        UnsupportedModelError: as it says.
    """
    reason = next(_reasons(model, facts), None)
    if reason is not None:
        raise refusal(facts, reason)


def refusal(facts: ModelFacts, reason: str) -> UnsupportedModelError:
    """The error that says why a model is not served."""
    return UnsupportedModelError(
        f"{facts.model_class} ({facts.model_type}) was asked for with sinks in continuous batching, whose paged cache "
        f"cannot serve it exactly: {reason}. Use generate, or serve without --continuous-batching."
    )


def _reasons(model: Any, facts: ModelFacts) -> Iterator[str]:
    """Why not, cheapest first."""
    for index, layer in enumerate(facts.layers):
        if reason := _of_layer(layer):
            yield f"layer {index} {reason}"
    if facts.one_by_one is not None:
        yield facts.one_by_one.reason
    if facts.position_source != "position_ids":
        yield "it takes positions from the order of its keys"
    if model.config._attn_implementation.endswith("eager") and _caps_logits(text_config(model)):
        yield (
            "its attention caps logits (attn_logit_softcapping), which transformers' eager attention leaves out there. "
            "With attn_implementation='flash_attention_2' they are capped"
        )
    yield from _of_groups(text_config(model), facts)
    yield from _of_shapes(model, facts)


def _caps_logits(config: Any) -> bool:
    return getattr(config, "attn_logit_softcapping", None) is not None


def _of_layer(layer: LayerFacts) -> str:
    if layer.entry.state:
        return "keeps a recurrent state"
    if not layer.entry.attention:
        return "keeps no keys of its own"
    if layer.ordered:
        return "takes distances from the order of its keys"
    if layer.adapter.values is not None:
        return "keeps its rotated part beside a latent cache"
    return "is on another process" if layer.elsewhere else ""


def _of_groups(config: Any, facts: ModelFacts) -> Iterator[str]:
    """Where transformers groups layers by other windows than those that they have."""
    try:
        groups = transformers_models.group_layers(config)
    except ValueError as unknown:
        yield f"transformers does not know its layers there ({unknown})"
        return
    window = {transformers_models.FULL: None, transformers_models.SLIDING: getattr(config, "sliding_window", None)}
    grouped = {index: window[name] for name, indices in groups.items() for index in indices}
    own = {index: layer.entry.sliding_window for index, layer in enumerate(facts.layers)}
    if grouped != own:
        windows = ", ".join(str(one or "all tokens") for one in sorted(set(own.values()), key=str))
        yield f"its layers have windows of {windows}, and would get others there"


def _of_shapes(model: Any, facts: ModelFacts) -> Iterator[str]:
    """Where it caches other tensors than pages are made for."""
    dtype, samples = _samples.get(model, (None, ()))
    if dtype != model.dtype:
        samples = sample(model, facts)
        _samples[model] = (model.dtype, samples)
    heads, dim = transformers_models.page_shape(text_config(model))
    for index, one in enumerate(samples):
        for name, states in (("keys", one.keys), ("values", one.values)):
            if states is None or (states.shape[1], states.shape[3]) != (heads, dim) or states.dtype != model.dtype:
                found = None if states is None else (*states.shape[1::2], states.dtype)
                yield f"layer {index} caches {name} of {found}, and pages hold {(heads, dim, model.dtype)}"
