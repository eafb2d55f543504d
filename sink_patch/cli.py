"""The command line, `sink-patch`: each command adds itself."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import sink_patch
from sink_patch.errors import SinkPatchError
from sink_patch.evaluate import configure, export, inspect
from sink_patch.evaluate.chat import command as chat
from sink_patch.evaluate.demo import command as demo
from sink_patch.evaluate.measures import command as measures

_COMMANDS = (demo, chat, inspect, configure, measures, export)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, or print the help where none is named.

    Returns:
        The exit status: 0, 2 after a `SinkPatchError`, 130 after an interrupt.
    """
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except SinkPatchError as failure:
        print(f"sink-patch: {' '.join(str(failure).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nsink-patch: stopped.", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sink-patch", description="Attention-sink caches for transformers: see one at work, and check a model."
    )
    parser.add_argument("--version", action="version", version=f"sink-patch {sink_patch.__version__}")
    parser.set_defaults(run=lambda _arguments: parser.print_help())  # each command sets its own
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in _COMMANDS:
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
