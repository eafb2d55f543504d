"""`sink_patch.inspect`: what would happen to a model, layer by layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from torch import nn

from sink_patch.arguments import Sizes
from sink_patch.compat import why_not_traced
from sink_patch.models.cost.sample import sample
from sink_patch.models.cost.window import Cost, cost_of
from sink_patch.models.entries import text_config, unwrapped
from sink_patch.models.examine import examine
from sink_patch.models.facts import LayerFacts
from sink_patch.models.horizon import horizon


@dataclass(frozen=True)
class LayerReport:
    """One layer: what turns when its tokens move, and what it holds."""

    layer_type: str
    adapter: str
    holds: str


@dataclass(frozen=True)
class Report:
    """What `sink_patch.inspect` found; `str()` is for people, the fields and `as_dict()` for programs.

    `horizon` is the RoPE position (tokens) at which the clock is set back. `cost` has what the window costs, in bytes a
    row: `cost.window_bytes`, `cost.token_bytes` (of a token more), `cost.state_bytes`, and the `cost.dtype`.
    `why_not_compiled` says why it decodes without a graph even where `compile_config` asks for one; None: with one.
    """

    model_class: str
    model_type: str
    family: str
    window_length: int
    num_sink_tokens: int
    context_length: int
    horizon: int
    cost: Cost
    why_not_compiled: str | None
    layers: tuple[LayerReport, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.model_class} ({self.model_type}) can stream with attention sinks.",
            f"  family   {self.family}",
            f"  window   {self.window_length} tokens, the first {self.num_sink_tokens} of them for good",
            f"  horizon  positions stay below {self.horizon} (trained on {self.context_length})",
            f"  memory   {self.cost}",
            f"  compiled {self._compiled}",
        ]
        start = 0
        for layer, same in groupby(self.layers):
            count = len(list(same))
            span = f"layer {start}" if count == 1 else f"layers {start} to {start + count - 1}"
            lines.append(f"  {span:<16} {layer.layer_type}: {layer.adapter}; {layer.holds}")
            start += count
        return "\n".join(lines)

    @property
    def _compiled(self) -> str:
        reason = self.why_not_compiled
        return "one graph for all tokens, with compile_config" if reason is None else f"never: {reason}"


def inspect(
    model: nn.Module,
    window_length: int = Sizes.window_length,
    num_sink_tokens: int = Sizes.num_sink_tokens,
) -> Report:
    """Family, adapter and kind of each layer of a model, proven by the probe, and what a window costs.

    No cache is made for that. One forward of one token shows what the model caches of it, in which dtype; the probe
    takes two more, once for a model object.

    Raises:
        SinkArgumentError: impossible sizes.
        UnsupportedModelError: the model cannot stream; the message says why.
    """
    sizes = Sizes(window_length, num_sink_tokens)  # which checks them
    model = unwrapped(model)
    facts = examine(model)
    clock = horizon(facts, window_length, num_sink_tokens)
    return Report(
        model_class=facts.model_class,
        model_type=facts.model_type,
        family=facts.family or "none registered; chosen by the probe",
        window_length=window_length,
        num_sink_tokens=num_sink_tokens,
        context_length=facts.context.length,
        horizon=clock,
        cost=cost_of(facts, text_config(model), sample(model, facts), sizes),
        why_not_compiled=facts.why_no_graph or why_not_traced(),
        layers=tuple(_layer(layer, window_length, num_sink_tokens) for layer in facts.layers),
    )


def _layer(layer: LayerFacts, window_length: int, num_sink_tokens: int) -> LayerReport:
    entry, kind = layer.entry, layer.kind(window_length, num_sink_tokens)
    if not entry.attention:
        return LayerReport(
            entry.layer_type or "other", "no keys", "its recurrent state, untouched" if entry.state else "nothing"
        )
    holds = f"window of {kind.capacity} with {kind.num_sink_tokens} sinks"
    if kind.local:
        holds = f"its own sliding window of {kind.capacity}, no sinks"
    holds += "; its recurrent state, untouched" if entry.state else ""
    return LayerReport(entry.layer_type or "full_attention", layer.adapter.describe(), holds)
