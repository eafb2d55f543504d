"""`sink-patch eval cost`: its arguments."""

from __future__ import annotations

import argparse
from pathlib import Path

from sink_patch.errors import SinkArgumentError
from sink_patch.evaluate.measures import picture, plots, records
from sink_patch.evaluate.measures.cost.figures import Plan, table
from sink_patch.evaluate.measures.picture import add_plot
from sink_patch.evaluate.options import DEFAULT, Commands, add_dtype, add_model, add_window


def add(measures: Commands) -> None:
    """Add the measure."""
    cost = measures.add_parser(
        "cost",
        help="measure memory and milliseconds a token over the length of a stream",
        description="Measures memory and milliseconds a token after 1, 2, 4 and more windows, with the model's own "
        "cache, which grows, and with a sink cache. Blocks of single tokens take turns; the figures are medians.",
    )
    add_model(cost)
    add_window(cost)
    cost.add_argument(
        "--windows",
        default=",".join(map(str, Plan.windows)),
        metavar="LIST",
        help=f"lengths of the stream, in windows {DEFAULT}",
    )
    cost.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    add_plot(cost)
    add_dtype(cost)
    cost.set_defaults(run=_cost)


def _cost(arguments: argparse.Namespace) -> None:
    from sink_patch.evaluate import models
    from sink_patch.evaluate.measures.cost import run

    plan = Plan(arguments.window_length, arguments.num_sink_tokens, _numbers(arguments.windows))
    records.check_writable(arguments.json)
    records.check_own(arguments.json, "cost")
    plots.check(arguments.plot)
    loaded = models.load(arguments.model, arguments.dtype)
    record = run.measure(loaded, plan)
    print(table(record))
    if arguments.json is not None:
        records.write(arguments.json, record)
    if arguments.plot is not None:
        picture.draw([record], arguments.plot)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as failure:
        raise SinkArgumentError(f"windows={text!r} is no list of numbers. Give one such as 1,2,4,8.") from failure
