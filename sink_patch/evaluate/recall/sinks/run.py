"""`sink-patch eval sinks`: where attention lies, and how many sinks a model needs.

StreamingLLM (arXiv 2309.17453, section 3.1 and table 2) finds that models without sinks of their own put much of their
attention on the first tokens, whatever these say, and that four of them restore the perplexity.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import sink_patch
from sink_patch.arguments import Sizes
from sink_patch.errors import SinkArgumentError
from sink_patch.evaluate import models
from sink_patch.evaluate.measures import plots, records
from sink_patch.evaluate.measures.records import Record
from sink_patch.evaluate.recall.asking import Stream
from sink_patch.evaluate.recall.sinks import attention, figures, maps

_PIECE = 32  # tokens in a forward


@dataclass(frozen=True)
class Plan:
    """What is read.

    Args:
        window_length: tokens in the window, including the sinks.
        num_sink_tokens: how many of the first tokens the shares of attention are of.
        sinks: the numbers of sinks that are tried.
        tokens: how long each stream is.
        attention_tokens: how many tokens the attention maps are of.

    Raises:
        SinkArgumentError: impossible sizes, or nothing would be scored.
    """

    window_length: int = Sizes.window_length
    num_sink_tokens: int = Sizes.num_sink_tokens
    sinks: tuple[int, ...] = (0, 1, 2, 4, 8, 16)
    tokens: int = 2048
    attention_tokens: int = 256

    def __post_init__(self) -> None:
        for number in (self.num_sink_tokens, *self.sinks):
            Sizes(self.window_length, number)
        if self.window_length < 2 * max(_PIECE, *self.sinks):
            raise SinkArgumentError(
                f"window_length={self.window_length} is too short to try {max(self.sinks)} sinks in it. Use "
                f"{2 * max(_PIECE, *self.sinks)} or more."
            )
        if self.tokens < 2 * self.window_length:
            raise SinkArgumentError(
                f"tokens={self.tokens}: a stream shows what sinks are for where the first tokens have left the window. "
                f"Read {2 * self.window_length} tokens or more."
            )
        if not self.num_sink_tokens < self.attention_tokens <= self.tokens:
            raise SinkArgumentError(
                f"attention_tokens={self.attention_tokens}: give more than the {self.num_sink_tokens} sinks, and no "
                f"more than the {self.tokens} tokens that are read."
            )


def run(arguments: argparse.Namespace) -> None:
    """The command: measure, print tables and the answer, write what was asked for.

    Raises:
        SinkArgumentError: a file cannot be read or written, the text is too short, or the sizes are impossible.
        UnsupportedModelError: the model cannot stream, or returns no attention weights.
    """
    plan = Plan(
        arguments.window_length,
        arguments.num_sink_tokens,
        tuple(sorted(arguments.sinks)),
        arguments.tokens,
        arguments.attention_tokens,
    )
    path: Path = arguments.text
    text = records.read_text(path)
    records.check_writable(arguments.json)
    records.check_own(arguments.json, "sinks")
    plots.check(arguments.plot)
    loaded = models.load(arguments.model, arguments.dtype)
    ids = torch.tensor(loaded.tokenizer(text)["input_ids"])  # [tokens of the text]
    if len(ids) < plan.tokens:
        raise SinkArgumentError(f"{path.name} has {len(ids)} tokens, but tokens={plan.tokens}. Ask for fewer.")
    layers = attention.of_text(loaded.model, ids[: plan.attention_tokens])
    record: Record = {
        "measure": "sinks",
        **records.about(loaded),
        "text": records.about_text(path, text),
        "window_length": plan.window_length,
        "num_sink_tokens": plan.num_sink_tokens,
        "tokens": plan.tokens,
        "piece": _PIECE,
        "attention": figures.attention(layers, plan.num_sink_tokens, plan.attention_tokens),
        "perplexity": figures.perplexity(scores(loaded.model, ids[: plan.tokens], plan)),
    }
    print(figures.table(record))
    if arguments.json is not None:
        records.write(arguments.json, record)
    if arguments.plot is not None:
        maps.draw(record, layers, arguments.plot)


def scores(model: Any, ids: torch.Tensor, plan: Plan) -> dict[int, torch.Tensor]:
    """By number of sinks: negative log-likelihoods in nats of the tokens behind the first window, shape [scored].

    The text goes in by pieces of 32 tokens, so that a token sees the sinks and between W - 32 and W tokens in all;
    that is some times as fast as single tokens, and the same for all numbers of sinks.
    """
    found = {}
    with torch.inference_mode():
        for number in plan.sinks:
            cache = sink_patch.SinkCache(plan.window_length, number, model=model)
            pieces = tqdm(_pieces(len(ids), plan.window_length), desc=f"{number} sinks")
            found[number] = torch.cat(list(_read(Stream(model, cache), ids, pieces)))
    return found


def _pieces(tokens: int, window_length: int) -> Sequence[tuple[int, int]]:
    """(first, behind the last) of what goes into one forward: a window, then pieces, up to the last token but one."""
    starts = [0, *range(window_length, tokens - 1, _PIECE)]
    return list(zip(starts, [*starts[1:], tokens - 1], strict=True))


def _read(stream: Stream, ids: torch.Tensor, pieces: Any) -> Iterator[torch.Tensor]:
    for first, behind in pieces:
        logits = stream.feed(tuple(ids[first:behind].tolist()), behind - first if first else 1)
        if first:  # [tokens of the piece]
            targets = ids[first + 1 : behind + 1].to(logits.device)
            yield torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none").cpu()
