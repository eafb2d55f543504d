"""What is known of a model before any forward: from its class, its config and its family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn

from sink_patch.compat import Entry, installed_shim
from sink_patch.errors import UnsupportedModelError
from sink_patch.models.adapters.adapter import Adapter, AdapterFactory
from sink_patch.models.entries import decoder_of, read_entries, text_config
from sink_patch.models.facts import LayerFacts, ModelFacts
from sink_patch.models.families.family import Family, OneByOne, PositionSource
from sink_patch.models.families.registry import find_family
from sink_patch.models.positions import Context, read_context


@dataclass(frozen=True, eq=False)
class Claim:
    """What is claimed of a model; the probe proves it, or finds what is missing.

    Args:
        model: it is about this model.
        family: which claims the model; None: no family does.
        context: the positions that may be used.
        entries: of the model's own cache.
    """

    model: nn.Module
    family: Family | None
    context: Context
    entries: Sequence[Entry]

    @property
    def position_source(self) -> PositionSource:
        """Where the model's forward takes positions from."""
        return "position_ids" if self.family is None else self.family.position_source_of(text_config(self.model))

    def adapters_of(self, factory: AdapterFactory) -> Sequence[Adapter]:
        """What a function of the family gives for the model: one adapter for each entry.

        Raises:
            UnsupportedModelError: it gives something else, or another number of them.
        """
        adapters: Any = factory(self.model)
        name, model = None if self.family is None else self.family.name, type(self.model).__name__
        if not isinstance(adapters, Sequence) or not all(isinstance(one, Adapter) for one in adapters):
            raise UnsupportedModelError(
                f"The family {name!r} gave {adapters!r} for {model}. Mend the family's function: it gives a list with "
                "one sink_patch.Adapter for each layer of the cache."
            )
        if len(adapters) != len(self.entries):
            raise UnsupportedModelError(
                f"The family {name!r} gave {len(adapters)} adapters for {model}, whose cache has {len(self.entries)} "
                "layers. Mend the family's function: one adapter for each layer."
            )
        return adapters

    def facts(self, adapters: Sequence[Adapter]) -> ModelFacts:
        """All facts about the model, if these are its adapters: one for each entry."""
        family, source = self.family, self.position_source
        ordered = source == "columns"
        return ModelFacts(
            model_class=type(self.model).__name__,
            model_type=text_config(self.model).model_type,
            family=None if family is None else family.name,
            layers=tuple(
                LayerFacts(entry, adapter, ordered, elsewhere=index in self.elsewhere)
                for index, (entry, adapter) in enumerate(zip(self.entries, adapters, strict=True))
            ),
            context=self.context,
            position_source=source,
            one_by_one=self.one_by_one,
            explicit_mask=installed_shim().explicit_masks or ordered or (family is not None and family.explicit_mask),
        )

    @property
    def has_states(self) -> bool:
        """Whether some layers hold a recurrent or convolution state, which cannot be taken back."""
        return any(entry.state for entry in self.entries)

    @cached_property
    def elsewhere(self) -> frozenset[int]:
        """The layers that other processes have (pipeline parallel), by index; stand-ins are in their place here."""
        layers = getattr(decoder_of(self.model), "layers", ())
        return frozenset(index for index, layer in enumerate(layers) if isinstance(layer, nn.Identity))

    @property
    def entries_here(self) -> Sequence[Entry]:
        """The entries, of which those of layers elsewhere hold no attention."""
        return [
            replace(entry, attention=False) if index in self.elsewhere else entry
            for index, entry in enumerate(self.entries)
        ]

    @property
    def one_by_one(self) -> OneByOne | None:
        """Why several tokens cannot follow others in one forward, if so."""
        if self.family is None or self.family.whole_prompts is None:
            return None
        windows = [entry.sliding_window for entry in self.entries if entry.sliding_window is not None]
        return OneByOne(self.family.whole_prompts, min(windows, default=0))


def read_claim(model: nn.Module) -> Claim:
    """Put together what is known of a model; nothing is computed.

    Raises:
        UnsupportedModelError: its class, its config or its family tells that it cannot stream.
    """
    family = _family_of(model)
    return Claim(model, family, read_context(text_config(model), family), read_entries(model))


def _family_of(model: nn.Module) -> Family | None:
    """The model's family; None where no family claims it."""
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_input_embeddings"):
        raise UnsupportedModelError(
            f"A {type(model).__name__} is not a transformers model, so nothing tells how its cache turns. Pass the "
            "transformers model itself."
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
