"""Figures of the records in results/: `python -m tests.bench.plots` (needs matplotlib: `pip install -e ".[bench]"`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

RESULTS = Path(__file__).parent / "results"
NAMES = {"ours": "sink_patch", "static": "StaticCache", "dynamic": "DynamicCache", "old": "old SinkCache (4.52.4)"}


def record(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


def update(axes: Axes) -> None:
    """Time of the caches in a decode step, against the window."""
    rows = record("update-4.52.4-cpu.json")["rows"]
    for name, words in NAMES.items():
        axes.loglog([row["W"] for row in rows], [row[f"{name}_ms"] for row in rows], "o-", label=words)
    axes.set(xlabel="window_length", ylabel="ms a step, 30 layers", title="The cache's own work")
    axes.set_xticks([row["W"] for row in rows], [f"{row['W']:,}" for row in rows])
    axes.minorticks_off()
    axes.legend()


def drift(axes: Axes) -> None:
    """Errors of cached keys, against the number of tokens."""
    rows = record("precision-100000-cpu.json")["rows"]
    for dtype, style in (("bfloat16", "o-"), ("float16", "s--")):
        for cache, colour in (("ours", "C0"), ("the old SinkCache", "C3")):
            mine = [row for row in rows if (row["cache"], row["dtype"]) == (cache, dtype)]
            label = f"{cache.replace('ours', 'sink_patch').replace('the old', 'old')}, {dtype}"
            axes.loglog(
                [row["tokens"] for row in mine], [row["worst_error"] for row in mine], style, color=colour, label=label
            )
    axes.set(xlabel="tokens", ylabel="worst relative error of a key", title="Drift of cached keys in 16 bits")
    axes.set_ylim(3e-4, 1)
    axes.legend(loc="upper right", ncols=2)


def forever(axes: Axes) -> None:
    """Error and memory in a stream of four million tokens."""
    rows = record("stream-4000000-cpu.json")["rows"]
    millions = [row["tokens"] / 1e6 for row in rows]
    axes.plot(millions, [row["worst_error"] for row in rows], "C0.-", label="worst error against the oracle")
    axes.set(xlabel="million tokens", ylabel="relative error of the logits", title="A stream of 4 million tokens")
    axes.set_ylim(0, 2 * max(row["worst_error"] for row in rows))
    memory = axes.twinx()
    memory.plot(millions, [row["resident_mb"] for row in rows], "C1.-", label="memory of the process")
    memory.set_ylabel("MB")
    memory.set_ylim(0, 1.5 * max(row["resident_mb"] for row in rows))
    lines = [*axes.get_lines(), *memory.get_lines()]
    axes.legend(lines, [str(line.get_label()) for line in lines], loc="lower right")


def main() -> None:
    figure, places = plt.subplots(1, 3, figsize=(16, 4.6), layout="constrained")
    for draw, axes in zip((update, drift, forever), places, strict=True):
        draw(axes)
    figure.savefig(RESULTS / "figures.png", dpi=110)


if __name__ == "__main__":
    main()
