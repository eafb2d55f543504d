"""`sink-patch inspect MODEL` and `sink-patch families`: which models stream, and how."""

from __future__ import annotations

import argparse

from sink_patch.evaluate.options import Commands, add_dtype, add_model, add_window


def add(commands: Commands) -> None:
    """Add the commands."""
    inspect = commands.add_parser(
        "inspect",
        help="say whether and how a model can stream, layer by layer, and what a window costs",
        description="Loads a model on the CPU and says whether and how it can stream, layer by layer, and how "
        "many bytes a window takes.",
    )
    add_model(inspect)
    add_window(inspect)
    add_dtype(inspect)
    inspect.set_defaults(run=_inspect)
    families = commands.add_parser(
        "families",
        help="list all models of the installed transformers: exact, and how, or refused, and why",
        description="Prints a table in Markdown of all causal language models of the installed transformers.",
    )
    families.set_defaults(run=_families)


def _inspect(arguments: argparse.Namespace) -> None:
    import sink_patch
    from sink_patch.evaluate import models

    model = models.load(arguments.model, arguments.dtype).model
    print(sink_patch.inspect(model, arguments.window_length, arguments.num_sink_tokens))


def _families(_arguments: argparse.Namespace) -> None:
    import sink_patch

    print(sink_patch.coverage())
