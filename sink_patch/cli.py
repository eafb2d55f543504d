"""The command line, `sink-patch`: each command adds itself."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import sink_patch
from sink_patch.errors import SinkPatchError
from sink_patch.evaluate import configure, export, inspect
from sink_patch.evaluate.chat import command as chat
from sink_patch.evaluate.demo import command as demo
from sink_patch.evaluate.measures import command as measures

_CANNOT_WRITE = (errno.ENOSPC, errno.EPIPE)  # a full disk, a closed pipe
_COMMANDS = (demo, chat, inspect, configure, measures, export)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, or print the help where none is named.

    Returns:
        The exit status: 0, 1 where the output cannot be written, 2 after a `SinkPatchError`, 130 after an interrupt.
    """
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except OSError as failure:
        if failure.errno not in _CANNOT_WRITE:
            raise
        with Path(os.devnull).open("w") as nowhere:  # else Python would try once more at its end, with a traceback
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        print(f"sink-patch: Not all could be written: {failure.strerror}. Write to another place.", file=sys.stderr)
        return 1
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
