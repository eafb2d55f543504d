"""Arguments that several commands have."""

from __future__ import annotations

import argparse
from typing import TypeAlias

from sink_patch.arguments import Sizes
from sink_patch.errors import SinkArgumentError

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
DEFAULT = "(default: %(default)s)"  # argparse fills it in
_DTYPES = ("float32", "bfloat16", "float16")


def add_model(command: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """Add MODEL."""
    command.add_argument(
        "model",
        nargs="?" if optional else None,
        metavar="MODEL",
        help="a model directory, or a name on the Hugging Face hub",
    )


def add_window(command: argparse.ArgumentParser) -> None:
    """Add the two sizes."""
    add_window_length(command)
    add_num_sink_tokens(command)


def add_window_length(
    command: argparse.ArgumentParser, default: int = Sizes.window_length, holds: str = "the sinks"
) -> None:
    """Add the one size; `holds` is what is counted in."""
    command.add_argument(
        "--window-length",
        type=int,
        default=default,
        metavar="N",
        help=f"tokens in the window, including {holds} {DEFAULT}",
    )


def add_num_sink_tokens(command: argparse._ActionsContainer) -> None:
    """Add the other, also to a group of which one may be given."""
    command.add_argument(
        "--num-sink-tokens",
        type=int,
        default=Sizes.num_sink_tokens,
        metavar="N",
        help=f"first tokens that stay in the window {DEFAULT}",
    )


def add_dtype(command: argparse.ArgumentParser) -> None:
    """Add the precision."""
    command.add_argument(
        "--dtype", choices=_DTYPES, default="float32", help=f"precision to load the model in {DEFAULT}"
    )


def check_utf8(option: str, text: str) -> None:
    """Refuse a text of the command line with bytes that are not UTF-8: they are surrogates, which no tokenizer takes.

    Raises:
        SinkArgumentError: it has some.
    """
    try:
        text.encode()
    except UnicodeEncodeError as failure:
        raise SinkArgumentError(f"The text of {option} is not UTF-8. Check the encoding of your terminal.") from failure
