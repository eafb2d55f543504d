"""`sink-patch eval perplexity`: its arguments."""

from __future__ import annotations

import argparse
from pathlib import Path

from sink_patch.evaluate.measures import picture, plots
from sink_patch.evaluate.measures.perplexity.plan import WAYS, Plan
from sink_patch.evaluate.measures.picture import add_plot
from sink_patch.evaluate.options import DEFAULT, Commands, add_dtype, add_model, add_window


def add(measures: Commands) -> None:
    """Add the measure."""
    perplexity = measures.add_parser(
        "perplexity",
        help="compare the perplexity of a stream with that of exact recomputation and of the dense cache",
        description="Reads a long text with a sink cache, token by token, and compares its perplexity with that of "
        "other ways: the model's own cache, which grows (dense); the newest window read anew for each token, exact "
        "and slow (recomputed); a window without sinks (window); sinks that keep their positions in the text "
        "(text-positions). On a CPU this takes minutes. With --json the same command goes on where it was stopped.",
    )
    add_model(perplexity)
    perplexity.add_argument("--text", type=Path, required=True, metavar="FILE", help="the text to read, in UTF-8")
    add_window(perplexity)
    sizes = Plan()
    perplexity.add_argument(
        "--tokens", type=int, default=sizes.tokens, metavar="N", help=f"how many tokens of the text to read {DEFAULT}"
    )
    perplexity.add_argument(
        "--every",
        type=int,
        default=sizes.every,
        metavar="N",
        help=f"score every N-th position {DEFAULT}",
    )
    perplexity.add_argument("--ways", default=",".join(WAYS), metavar="NAMES", help=f"ways to read it {DEFAULT}")
    perplexity.add_argument(
        "--dense-tokens",
        type=int,
        default=sizes.dense_tokens,
        metavar="N",
        help=f"the dense cache stops after so many tokens, as its memory grows with each {DEFAULT}",
    )
    perplexity.add_argument(
        "--json", type=Path, metavar="FILE", help="write the figures to this file, and go on from there if it is there"
    )
    add_plot(perplexity)
    add_dtype(perplexity)
    perplexity.set_defaults(run=_perplexity)


def _perplexity(arguments: argparse.Namespace) -> None:
    from sink_patch.evaluate import models
    from sink_patch.evaluate.measures.perplexity import run

    plan = Plan(
        window_length=arguments.window_length,
        num_sink_tokens=arguments.num_sink_tokens,
        tokens=arguments.tokens,
        every=arguments.every,
        dense_tokens=arguments.dense_tokens,
        ways=tuple(arguments.ways.split(",")),
    )
    plots.check(arguments.plot)
    job = run.prepare(arguments.text, plan, arguments.json, arguments.model, arguments.dtype)
    loaded = models.load(arguments.model, arguments.dtype)
    run.measure(loaded, job)
    print(run.report(loaded.name, job))
    if arguments.plot is not None:
        picture.draw([job.results.as_record()], arguments.plot)
