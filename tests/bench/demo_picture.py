"""The picture of `sink-patch demo` for the README: `python -m tests.bench.demo_picture [--run]`.

With `--run` the demo runs with SmolLM2-135M-Instruct and its defaults (some minutes; the model is downloaded once),
and what it said is kept in results/demo-smollm2.json. From that file results/demo.png is drawn (needs matplotlib).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import textwrap
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

RESULTS = Path(__file__).parent / "results"
RECORD, PICTURE = RESULTS / "demo-smollm2.json", RESULTS / "demo.png"
COLUMNS, ROWS = 72, 27
COLOURS = ("tab:gray", "tab:red", "tab:blue")


class Recorder:
    """A screen of the demo that remembers what it is shown."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.windows: list[dict[str, str]] = [{"text": ""}]

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_raised: object) -> None:
        pass

    def line(self, words: str) -> None:
        self.lines.append(words.strip())

    def text(self, piece: str) -> None:
        self.windows[-1]["text"] += piece

    def figures(self, words: str, *, is_window: bool) -> None:
        self.windows[-1]["figures"] = words
        if is_window:
            self.windows.append({"text": ""})

    def table(self, rows: Any, *, is_window: bool) -> None:
        if is_window:
            print(" | ".join(rows[-1]), flush=True)


def run() -> None:
    from sink_patch.evaluate import models
    from sink_patch.evaluate.demo import compare, story
    from tests.bench import records

    settings, screen, loaded = story.Settings(), Recorder(), models.load()
    ids = compare.text_ids(loaded, settings.window_length)
    story.tell(loaded, settings, screen)
    points = compare.show(loaded, ids, settings.window_length, compare.SINKS, screen)
    records.write(
        RECORD,
        model=loaded.name,
        **{name: value for name, value in dataclasses.asdict(settings).items() if name != "num_sink_tokens"},
        lines=screen.lines,
        windows=screen.windows,
        ways=compare.ways(compare.SINKS),
        points=[
            {
                "tokens": point.tokens,
                "perplexity": [round(one, 3) for one in point.perplexity],
                "megabytes": [round(one, 3) for one in point.megabytes],
            }
            for point in points
        ],
    )


def terminal(axes: Axes, record: dict[str, Any]) -> None:
    """Three places of the story and the figures, as a terminal shows them."""
    axes.set_facecolor("#1e1e1e")
    axes.set(xticks=[], yticks=[], xlim=(0, COLUMNS + 4), ylim=(ROWS, -1))
    shown = [("$ sink-patch demo --compare", "#8ae234")]
    for place, lines in ((0, slice(9)), (3, slice(9)), (-1, slice(-4, None))):
        shown += [(line, "white") for line in wrapped(record["windows"][place]["text"])[lines]]
        shown.append(("…" if place >= 0 else "", "#888888"))
    # without the speed: the tables of the README have it, from a machine that does nothing else
    figures = re.sub(r" \| [\d.]+ tokens/s", "", record["windows"][-1]["figures"])
    for row, (words, colour) in enumerate([*shown, (figures, "#fce94f")]):
        axes.text(2, row, words, color=colour, family="monospace", fontsize=8.6, va="center")


def wrapped(text: str) -> list[str]:
    return [line for paragraph in text.strip().split("\n") for line in textwrap.wrap(paragraph, COLUMNS)]


def curves(axes: Axes, record: dict[str, Any], name: str, first: int) -> None:
    points = [one for one in record["points"] if one["tokens"] >= first]
    for number, (way, colour) in enumerate(zip(record["ways"], COLOURS, strict=True)):
        values = [one[name][number] for one in points]
        style = "--" if number == 0 else "-"
        axes.plot([one["tokens"] for one in points], values, style, color=colour, label=way, linewidth=2)
    axes.axvline(record["window_length"], color="lightgray", linewidth=1, zorder=0)
    axes.set(xlim=(0, None), ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)


def draw() -> None:
    record = json.loads(RECORD.read_text())
    length = record["window_length"]
    figure, places = plt.subplot_mosaic(
        [["terminal", "perplexity"], ["terminal", "memory"]], figsize=(11, 5), width_ratios=(3, 2), layout="constrained"
    )
    terminal(places["terminal"], record)
    places["terminal"].set_title(
        f"{record['model']} tells a story, {length} tokens in sight, the prompt among them", fontsize=10
    )
    curves(places["perplexity"], record, "perplexity", length)
    places["perplexity"].set_title(f"Reading a novel: perplexity of the newest {length} tokens", fontsize=10)
    curves(places["memory"], record, "megabytes", 0)
    places["memory"].set_title("Size of the cache, MB", fontsize=10)
    places["memory"].set_xlabel("tokens read")
    places["memory"].legend(frameon=False, fontsize=9)
    figure.savefig(PICTURE, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="run the demo anew")
    if parser.parse_args().run:
        run()
    draw()


if __name__ == "__main__":
    main()
