"""`sink-patch eval plot`: one picture of one or several records, whatever they measured."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from sink_patch.errors import SinkArgumentError
from sink_patch.evaluate.measures import plots, records
from sink_patch.evaluate.measures.cost import figures as cost
from sink_patch.evaluate.measures.perplexity import figures as perplexity
from sink_patch.evaluate.measures.records import Record
from sink_patch.evaluate.options import Commands
from sink_patch.evaluate.recall import figures as recall
from sink_patch.evaluate.recall.sinks import figures as sinks

Panels = Callable[[Record], "list[plots.Panel]"]


def add(measures: Commands) -> None:
    """Add the command."""
    plot = measures.add_parser(
        "plot",
        help="draw records of measures, several models or settings in one picture",
        description="Draws the files that the measures write with --json into one picture: several models or settings "
        "in the same panels, several measures side by side. Needs matplotlib.",
    )
    plot.add_argument("records", type=Path, nargs="+", metavar="FILE.json", help="what a measure has written")
    plot.add_argument(
        "--out", type=Path, required=True, metavar="FILE.png", help="the picture to write: a .png, .svg or .pdf"
    )
    plot.set_defaults(run=_plot)


def add_plot(measure: argparse.ArgumentParser) -> None:
    """Add --plot to a measure. Its run begins with `plots.check`, and ends with `draw`."""
    measure.add_argument("--plot", type=Path, metavar="FILE", help="also draw the figures: a .png, .svg or .pdf")


def draw(found: Sequence[Record], path: Path) -> None:
    """Draw records into one picture.

    Raises:
        SinkArgumentError: nothing is known of how to draw one of them.
        SinkPatchError: matplotlib is not installed.
    """
    kinds = _panels()
    for record in found:
        if record["measure"] not in kinds:
            names = ", ".join(kinds)
            raise SinkArgumentError(f"There is no picture of {record['measure']!r}. Give records of one of {names}.")
    plots.draw(plots.together(found, [kinds[record["measure"]](record) for record in found]), path, _title(found))


def _panels() -> dict[str, Panels]:
    """By the name of a measure: what makes the panels of its records."""
    asked = dict.fromkeys(("streameval", "questions", "recall"), recall.panels)
    return {"perplexity": perplexity.panels, "cost": cost.panels, **asked, "sinks": sinks.panels}


def _title(found: Sequence[Record]) -> str:
    """What all records share."""
    models = {str(record.get("model")) for record in found}
    sizes = {(record.get("window_length"), record.get("num_sink_tokens")) for record in found}
    parts = [*(models if len(models) == 1 else ())]
    if len(sizes) == 1:
        ((window_length, num_sink_tokens),) = sizes
        parts += [f"window of {window_length} tokens", f"{num_sink_tokens} sinks"]
    return ", ".join(parts)


def _plot(arguments: argparse.Namespace) -> None:
    plots.check(arguments.out)
    draw([records.read(path) for path in arguments.records], arguments.out)
