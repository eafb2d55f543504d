"""`sink-patch chat MODEL`: its arguments."""

from __future__ import annotations

import argparse

from sink_patch.evaluate.chat.settings import MOST_TOKENS, WINDOW, Settings
from sink_patch.evaluate.options import DEFAULT, Commands, add_dtype, add_model, add_window_length
from sink_patch.evaluate.paths import model_source


def add(commands: Commands) -> None:
    """Add the command."""
    chat = commands.add_parser(
        "chat",
        help="talk with a model without end",
        description="Talks with a model for as long as you like, at constant memory and time a token: the system "
        "prompt stays in the window, and the oldest whole message leaves it. /help lists what can be done meanwhile.",
    )
    add_model(chat)
    chat.add_argument("--system", metavar="TEXT", help="the system prompt, which stays in the window")
    add_window_length(chat, WINDOW, "the system prompt")
    chat.add_argument(
        "--max-new-tokens", type=int, default=MOST_TOKENS, metavar="N", help=f"longest answer in tokens {DEFAULT}"
    )
    chat.add_argument(
        "--temperature", type=float, metavar="T", help="of sampling (default: what the model asks for, or 0.7)"
    )
    chat.add_argument(
        "--top-p", type=float, metavar="P", help="share to sample from (default: what the model asks for, or 0.9)"
    )
    chat.add_argument("--greedy", action="store_true", help="take the likeliest token always, and draw nothing")
    chat.add_argument("--seed", type=int, default=0, metavar="N", help=f"of sampling {DEFAULT}")
    add_dtype(chat)
    chat.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Run it; what cannot be is refused before the model is loaded.

    Raises:
        SinkPatchError: impossible settings, no such model, or one that cannot stream.
    """
    settings = Settings(
        window_length=arguments.window_length,
        max_new_tokens=arguments.max_new_tokens,
        system=arguments.system,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        greedy=arguments.greedy,
        seed=arguments.seed,
    )
    model_source(arguments.model)  # which refuses a wrong one
    from sink_patch.evaluate import models
    from sink_patch.evaluate.chat import program
    from sink_patch.evaluate.chat.template import Template

    template = Template(models.tokenizer_of(arguments.model))
    template.check_room(settings)
    program.run(models.load(arguments.model, arguments.dtype), template, settings)
