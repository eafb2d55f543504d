"""`sink-patch eval perplexity`: its arguments."""

from __future__ import annotations

import argparse
from pathlib import Path

from sink_patch.evaluate.options import DEFAULT, Commands, add_dtype, add_window


def add(measures: Commands) -> None:
    """Add the measure."""
    perplexity = measures.add_parser(
        "perplexity",
        help="compare the perplexity of a stream with that of exact recomputation",
        description="Reads a long text token by token with a sink cache, and compares its perplexity with that of "
        "recomputing the newest window for each token (exact, but slow), of a window without sinks, and of sinks "
        "that keep their positions in the text. On a CPU this takes minutes.",
    )
    perplexity.add_argument("model", metavar="MODEL", help="a model directory, or a name on the Hugging Face hub")
    perplexity.add_argument("--text", type=Path, required=True, metavar="FILE", help="the text to read, in UTF-8")
    add_window(perplexity)
    perplexity.add_argument(
        "--tokens", type=int, default=4096, metavar="N", help=f"how many tokens of the text to read {DEFAULT}"
    )
    perplexity.add_argument(
        "--every", type=int, default=8, metavar="N", help=f"score every N-th position past the window {DEFAULT}"
    )
    perplexity.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    add_dtype(perplexity)
    perplexity.set_defaults(run=_perplexity)


def _perplexity(arguments: argparse.Namespace) -> None:
    from sink_patch.evaluate import models
    from sink_patch.evaluate.measures.perplexity import figures, run

    plan = figures.Plan(
        window_length=arguments.window_length,
        num_sink_tokens=arguments.num_sink_tokens,
        tokens=arguments.tokens,
        every=arguments.every,
    )
    run.run(models.load(arguments.model, arguments.dtype), arguments.text, plan, arguments.json)
