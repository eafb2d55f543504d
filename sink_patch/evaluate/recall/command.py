"""`sink-patch eval streameval`, `recall` and `sinks`: their arguments."""

from __future__ import annotations

import argparse
from pathlib import Path

from sink_patch.errors import SinkArgumentError
from sink_patch.evaluate.measures import picture, records
from sink_patch.evaluate.options import DEFAULT, Commands, add_dtype, add_model, add_window

_WAYS = ("sinks", "dense")
_WAYS_OF_QUESTIONS = ("sinks", "window", "dense", "alone")
_WAYS_HELP = (
    "how the stream is read: sinks, window (without sinks), dense (all tokens, as far as the model's context reaches)"
)


def add(measures: Commands) -> None:
    """Add the measures."""
    _add_streameval(measures)
    _add_recall(measures)
    _add_sinks(measures)


def _add_streameval(measures: Commands) -> None:
    streameval = measures.add_parser(
        "streameval",
        help="ask in a long stream for facts inside and outside of the window (StreamEval of StreamingLLM)",
        description="Reads a stream of lines with facts, and asks every 10 lines what a line 5, 20, 50 and 100 lines "
        "back said: inside of the window the answers should be those of a dense cache, outside of it nothing is known. "
        "With --questions the stream is made of the questions of a file, each followed by its right answer.",
    )
    add_model(streameval)
    add_window(streameval)
    streameval.add_argument(
        "--windows", type=int, default=100, metavar="N", help=f"how many windows the stream is long {DEFAULT}"
    )
    streameval.add_argument(
        "--distance", type=_numbers, default=(5, 20, 50, 100), metavar="N,N", help="lines back (default: 5,20,50,100)"
    )
    streameval.add_argument(
        "--every", type=int, default=10, metavar="N", help=f"ask after every so many lines {DEFAULT}"
    )
    streameval.add_argument(
        "--questions",
        type=Path,
        metavar="FILE",
        help='JSON lines with "question", "choices" and "answer", in place of lines',
    )
    streameval.add_argument(
        "--dense-lines", type=int, default=200, metavar="N", help=f"lines or questions of the dense cache {DEFAULT}"
    )
    streameval.add_argument(
        "--ways",
        type=_names,
        metavar="NAME,NAME",
        help=f"{_WAYS_HELP}, alone "
        f"(each question in an empty cache; with --questions). Default: {','.join(_WAYS)}; "
        f"with --questions: {','.join(_WAYS_OF_QUESTIONS)}",
    )
    _add_output(streameval)
    streameval.set_defaults(run=_streameval)


def _add_recall(measures: Commands) -> None:
    recall = measures.add_parser(
        "recall",
        help="ask in a long chat for what was said some messages ago, with and without the kept system message",
        description="Writes a long chat in the model's template, in which the user says facts and the system message "
        "holds one for good, and asks for them later: recall over distance in messages, where the sinks are the first "
        "tokens alone, and where they are the whole system message.",
    )
    add_model(recall)
    add_window(recall)
    recall.add_argument(
        "--messages", type=int, default=200, metavar="N", help=f"how many messages the chat is long {DEFAULT}"
    )
    recall.add_argument(
        "--distance",
        type=_numbers,
        default=(2, 4, 8, 12, 16, 24, 32, 64),
        metavar="N,N",
        help="messages back, even numbers (default: 2,4,8,12,16,24,32,64)",
    )
    recall.add_argument("--every", type=int, default=8, metavar="N", help=f"ask after every so many messages {DEFAULT}")
    recall.add_argument(
        "--dense-messages", type=int, default=80, metavar="N", help=f"messages of the dense cache; 0: none {DEFAULT}"
    )
    _add_output(recall)
    recall.set_defaults(run=_recall)


def _add_sinks(measures: Commands) -> None:
    sinks = measures.add_parser(
        "sinks",
        help="show how much attention lies on the first tokens, and how many sinks the model needs",
        description="Shares of attention on the first tokens, layer by layer and head by head, in one forward over the "
        "beginning of a text; and the perplexity of a stream over numbers of sinks, which tells how many are needed.",
    )
    add_model(sinks)
    sinks.add_argument("--text", type=Path, required=True, metavar="FILE", help="the text to read, in UTF-8")
    add_window(sinks)
    sinks.add_argument(
        "--sinks",
        type=_numbers,
        default=(0, 1, 2, 4, 8, 16),
        metavar="N,N",
        help="numbers to try (default: 0,1,2,4,8,16)",
    )
    sinks.add_argument(
        "--tokens", type=int, default=2048, metavar="N", help=f"how many tokens the streams have {DEFAULT}"
    )
    sinks.add_argument(
        "--attention-tokens", type=int, default=256, metavar="N", help=f"tokens of the attention maps {DEFAULT}"
    )
    _add_output(sinks)
    sinks.set_defaults(run=_sinks)


def _add_output(measure: argparse.ArgumentParser) -> None:
    measure.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    picture.add_plot(measure)
    add_dtype(measure)


def _numbers(text: str) -> tuple[int, ...]:
    """Numbers between commas, each once; argparse says what is wrong with others."""
    return tuple(dict.fromkeys(int(one) for one in text.split(",")))


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(one.strip() for one in text.split(",")))


_numbers.__name__ = "list of numbers"  # in the message of argparse


def _streameval(arguments: argparse.Namespace) -> None:
    from sink_patch.evaluate.recall import run

    ways = arguments.ways or (_WAYS_OF_QUESTIONS if arguments.questions else _WAYS)
    common = run.Common.of(arguments, ways, arguments.dense_lines)
    records.check_own(arguments.json, "streameval")
    if arguments.questions:
        run.questions_of_a_file(common, arguments.questions)
    else:
        run.streameval(common, arguments.windows, arguments.distance, arguments.every)


def _recall(arguments: argparse.Namespace) -> None:
    from sink_patch.evaluate.recall import run

    dense = arguments.dense_messages
    if dense < 0:
        raise SinkArgumentError(f"dense_messages={dense} is negative. Give 0 (none) or more.")
    common = run.Common.of(arguments, ("sinks", "system", "dense") if dense else ("sinks", "system"), dense // 2 + 1)
    records.check_own(arguments.json, "recall")
    run.recall(common, arguments.messages, arguments.distance, arguments.every)


def _sinks(arguments: argparse.Namespace) -> None:
    from sink_patch.evaluate.recall.sinks import run

    run.run(arguments)
