"""The records of what a model is to a sink cache; `examine` makes them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from sink_patch.compat import Entry
from sink_patch.models.adapters.adapter import Adapter
from sink_patch.models.families.family import OneByOne, PositionSource
from sink_patch.models.positions import Context
from sink_patch.rules.kinds import LayerKind


@dataclass(frozen=True, eq=False)
class LayerFacts:
    """One entry of the model's cache, whatever the window: what it holds, and how that turns.

    Args:
        entry: what it holds.
        adapter: how that turns.
        ordered: whether keys must lie in the order of the stream, as positions are taken from it (ALiBi).
        elsewhere: whether another process has the layer (pipeline parallel); then nothing is ever stored here.
    """

    entry: Entry
    adapter: Adapter
    ordered: bool = False
    elsewhere: bool = False

    def kind(self, window_length: int, num_sink_tokens: int) -> LayerKind:
        """The kind of layer for a window; a sliding window shorter than that stays as it is, without sinks."""
        window = self.entry.sliding_window
        if window is not None and window < window_length:
            return LayerKind(window, 0, local=True, ordered=self.ordered)
        return LayerKind(window_length, num_sink_tokens, ordered=self.ordered)


@dataclass(frozen=True, eq=False)
class ModelFacts:
    """All that a cache needs to know of a model; holds no reference to it.

    Args:
        model_class, model_type: for messages.
        family: the name of its family; None: no family claims it, the probe chose the adapters.
        layers: one for each entry of its cache.
        context: the positions that may be used.
        position_source: where its forward takes positions from, see `Family`.
        one_by_one: after the first forward a text can go in by single tokens only, and why; None: by any number.
        explicit_mask: whether the model must be given a mask even where every column is visible.
    """

    model_class: str
    model_type: str
    family: str | None
    layers: tuple[LayerFacts, ...]
    context: Context
    position_source: PositionSource = "position_ids"
    one_by_one: OneByOne | None = None
    explicit_mask: bool = False

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """One for each layer."""
        return tuple(layer.adapter for layer in self.layers)

    @cached_property
    def has_states(self) -> bool:
        """Whether some layers hold a recurrent or convolution state, which cannot be taken back."""
        return any(layer.entry.state for layer in self.layers)

    @cached_property
    def sliding_windows(self) -> frozenset[int]:
        """The sliding windows that the model was trained with."""
        windows = [layer.entry.sliding_window for layer in self.layers]
        return frozenset(window for window in windows if window is not None)

    @cached_property
    def why_no_graph(self) -> str | None:
        """Why its tokens cannot go through a graph that is compiled once, as in "it ..."; None: they can."""
        if any(layer.elsewhere for layer in self.layers):
            return "it sends and receives between its layers (pipeline parallel), which torch does not trace"
        if self.position_source == "columns":
            return "it takes distances from the order of the keys (ALiBi), which a ring at a fixed place does not keep"
        return None if any(layer.entry.attention for layer in self.layers) else "it keeps no keys"

    def same_as(self, other: ModelFacts) -> bool:
        """Whether what was proven for `other` holds for this, too."""
        same = (self.model_type, self.family, self.context) == (other.model_type, other.family, other.context)
        return (
            same
            and len(self.layers) == len(other.layers)
            and all(
                one.entry == two.entry and one.ordered == two.ordered and one.adapter.same_as(two.adapter)
                for one, two in zip(self.layers, other.layers, strict=True)
            )
        )
