"""The picture of `sink-patch eval sinks`: attention maps, shares by layer and head, perplexity over sinks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sink_patch.evaluate.measures import plots
from sink_patch.evaluate.measures.records import Record
from sink_patch.evaluate.recall.sinks.attention import Attention
from sink_patch.evaluate.recall.sinks.figures import answer

_MAPS = 4  # layers whose maps are shown
_LEAST = 1e-4  # the darkest colour of a map


def draw(record: Record, layers: Sequence[Attention], path: Path) -> None:
    """Draw it into a file.

    Args:
        record: of this measure.
        layers: their attention.
        path: of the picture.

    Raises:
        SinkPatchError: what `plots.check` raises.
    """
    plots.check(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no state of pyplot
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * _MAPS, 8.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, _MAPS)
    shown = _spread(layers)
    maps = [figure.add_subplot(grid[0, column]) for column in range(len(shown))]
    for axes, layer in zip(maps, shown, strict=True):
        image = _map(axes, layer)
    figure.colorbar(image, ax=maps, label="attention, mean over heads", shrink=0.8)
    middle = _MAPS // 2
    heads = figure.add_subplot(grid[1, :middle])
    figure.colorbar(_heads(heads, record), ax=heads, label="share")
    _perplexity(figure.add_subplot(grid[1, middle:]), record)
    figure.suptitle(answer(record), fontsize=11, wrap=True)
    figure.savefig(path, dpi=100)


def _spread(layers: Sequence[Attention]) -> list[Attention]:
    """The first layer, the last one, and some between."""
    count = min(_MAPS, len(layers))
    return [layers[round(number * (len(layers) - 1) / max(1, count - 1))] for number in range(count)]


def _map(axes: Any, layer: Attention) -> Any:
    from matplotlib.colors import LogNorm

    image = axes.imshow(
        layer.mean_map.clamp(min=_LEAST).numpy(), norm=LogNorm(_LEAST, 1.0), cmap="magma", aspect="equal"
    )
    axes.set(title=f"layer {layer.layer}", xlabel="key", ylabel="query")
    return image


def _heads(axes: Any, record: Record) -> Any:
    """Shares as a map of layers and heads."""
    found = record["attention"]
    shares = [layer["heads"] for layer in found["layers"]]
    image = axes.imshow(
        list(itertools.zip_longest(*shares, fillvalue=float("nan"))), vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto"
    )
    axes.set(title=f"Share of attention on the first {found['first']} tokens", xlabel="layer", ylabel="head")
    axes.set_yticks(range(0, max(map(len, shares)), max(1, max(map(len, shares)) // 10)))
    labels = [layer["layer"] for layer in found["layers"]]
    step = max(1, len(labels) // 10)
    axes.set_xticks(range(0, len(labels), step), labels[::step])
    return image


def _perplexity(axes: Any, record: Record) -> None:
    found = record["perplexity"]
    places = range(len(found["sinks"]))
    values = [float("nan") if value is None else value for value in found["perplexity"]]
    axes.plot(places, values, "o-")
    for place, value in zip(places, values, strict=True):
        axes.annotate(f"{value:.2f}", (place, value), xytext=(4, 6), textcoords="offset points", fontsize=9)
    axes.set_xticks(places, found["sinks"])
    title = f"Perplexity of a stream of {record['tokens']:,} tokens, window of {record['window_length']}"
    axes.set(title=title, xlabel="sinks", ylabel="perplexity")
    axes.margins(y=0.15)
    axes.grid(alpha=0.25)
