"""`sink-patch eval`: each measure adds itself. Imported before any command is known, so without torch."""

from __future__ import annotations

from sink_patch.evaluate.measures import picture
from sink_patch.evaluate.measures.cost import command as cost
from sink_patch.evaluate.measures.perplexity import command as perplexity
from sink_patch.evaluate.options import Commands
from sink_patch.evaluate.recall import command as recall

_MEASURES = (perplexity, cost, recall, picture)


def add(commands: Commands) -> None:
    """Add the command."""
    command = commands.add_parser(
        "eval", help="measure what a model does in a stream", description="Measures what a model does in a stream."
    )
    command.set_defaults(run=lambda _arguments: command.print_help())  # each measure sets its own
    measures = command.add_subparsers(title="measures", metavar="MEASURE")
    for measure in _MEASURES:
        measure.add(measures)
