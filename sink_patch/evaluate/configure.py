"""`sink-patch configure DIR`: what it takes, and what it does with that. Imported before any command is known."""

from __future__ import annotations

import argparse
from pathlib import Path

from sink_patch.arguments import SYSTEM, TOKENS, TURNS, Settings, Sizes
from sink_patch.errors import SinkArgumentError
from sink_patch.evaluate.options import DEFAULT, Commands, add_num_sink_tokens, add_window_length

_DEFAULTS = {
    "window_length": Sizes.window_length,
    "num_sink_tokens": Sizes.num_sink_tokens,
    "keep_system": False,
    "whole_turns": False,
    "keep_streams": Settings.keep_streams,
}
"""Of all that --remove has no use for."""


def add(commands: Commands) -> None:
    """Add the command."""
    configure = commands.add_parser(
        "configure",
        help="let a model directory ask for a sink cache, so that pipelines and serve stream with no change of code",
        description="Writes the settings of a sink cache into the generation_config.json of a model directory, and "
        "shows what changes. The chat template tells where messages begin. What the file was is kept beside it.",
    )
    configure.add_argument("directory", type=Path, metavar="DIR", help="the directory of a model")
    add_window_length(configure)
    sinks = configure.add_mutually_exclusive_group()
    add_num_sink_tokens(sinks)
    sinks.add_argument("--keep-system", action="store_true", help="the system message stays in the window")
    configure.add_argument(
        "--whole-turns", action="store_true", help="the oldest whole message leaves a full window, not the oldest token"
    )
    configure.add_argument(
        "--keep-streams",
        type=int,
        default=Settings.keep_streams,
        metavar="N",
        help=f"streams that are kept for longer texts that begin alike {DEFAULT}",
    )
    configure.add_argument("--dry-run", action="store_true", help="show what would change, and write nothing")
    configure.add_argument("--remove", action="store_true", help="put back what was there before")
    configure.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Run it.

    Raises:
        SinkArgumentError: --remove and a setting.
        SinkPatchError: what `sink_patch.configure` and `unconfigure` raise.
    """
    import sink_patch

    if arguments.remove:
        _check_alone(arguments)
        sink_patch.unconfigure(arguments.directory, dry_run=arguments.dry_run)
    else:
        sink_patch.configure(
            arguments.directory,
            window_length=arguments.window_length,
            num_sink_tokens=SYSTEM if arguments.keep_system else arguments.num_sink_tokens,
            evict=TURNS if arguments.whole_turns else TOKENS,
            keep_streams=arguments.keep_streams,
            dry_run=arguments.dry_run,
        )
    if arguments.dry_run:
        print("Nothing was written.")


def _check_alone(arguments: argparse.Namespace) -> None:
    """Refuse settings beside --remove, which would have no effect."""
    given = [name for name, default in _DEFAULTS.items() if getattr(arguments, name) != default]
    if given:
        raise SinkArgumentError(
            f"--remove puts back what was there before, and takes no --{given[0].replace('_', '-')}. Leave one of the "
            "two out."
        )
