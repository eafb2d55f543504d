"""`sink-patch perplexity`: does a model stay fluent in a stream far longer than the window?

Its perplexity is compared with that of sliding-window recomputation (arXiv 2309.17453, section 4.1), which is slow and
exact. With sinks the two should be close; without sinks perplexity should be far higher.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import sink_patch
from sink_patch.errors import SinkArgumentError
from sink_patch.evaluate.measures.perplexity import scoring
from sink_patch.evaluate.measures.perplexity.figures import Plan, Row, as_dict, table
from sink_patch.evaluate.models import Loaded


def run(loaded: Loaded, text_file: Path, plan: Plan, json_file: Path | None = None) -> None:
    """The command: measure, print the table, and write JSON if `json_file` is given.

    Raises:
        SinkArgumentError: a file cannot be read or written, the text is too short, or the sizes are impossible.
        UnsupportedModelError: the model cannot stream.
    """
    try:
        text = text_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as failure:
        raise SinkArgumentError(f"The text {text_file} cannot be read: {failure}. Give a UTF-8 file.") from failure
    if json_file is not None and not json_file.parent.is_dir():  # before the long work, not after it
        raise SinkArgumentError(f"There is no directory {json_file.parent} for the JSON file. Make it first.")
    rows = measure(loaded, text, plan)
    print(
        f"{loaded.name}, {text_file.name}: {plan.tokens} tokens in a window of {plan.window_length}, "
        f"{len(plan.positions)} positions scored\n\n{table(rows)}"
    )
    if json_file is not None:
        figures = json.dumps(as_dict(rows, loaded, text_file, plan), indent=1)
        json_file.write_text(figures + "\n", encoding="utf-8")


def measure(loaded: Loaded, text: str, plan: Plan) -> list[Row]:
    """Read the text in several ways, with a progress bar on stderr for each; the first row is recomputation.

    Raises:
        SinkArgumentError: the text is too short, or the sizes are impossible.
        UnsupportedModelError: the model cannot stream.
    """
    ids = _token_ids(loaded, text, plan)
    sink_patch.SinkCache(
        plan.window_length, plan.num_sink_tokens, model=loaded.model
    )  # errors come before the long work
    rows = []
    with torch.inference_mode():
        for mode, read in _ways(loaded, int(ids[0]), plan).items():
            reading = scoring.Reading(loaded.model, ids, plan.positions, plan.window_length, partial(tqdm, desc=mode))
            started = time.perf_counter()
            scores = read(reading)
            rows.append(Row(mode, scores, time.perf_counter() - started))
    return rows


def _ways(loaded: Loaded, first_id: int, plan: Plan) -> dict[str, Callable[[scoring.Reading], torch.Tensor]]:
    """The ways of reading, by their names in the table."""
    bos = first_id if first_id == loaded.tokenizer.bos_token_id else None
    sinks = plan.num_sink_tokens
    ways: dict[str, Callable[[scoring.Reading], torch.Tensor]] = {
        "recomputed": lambda reading: scoring.recomputed(reading, bos),
        f"{sinks} sinks": lambda reading: scoring.streamed(reading, sinks),
        "0 sinks": lambda reading: scoring.streamed(reading, 0),
    }
    if not _has_shorter_window(loaded.model, plan.window_length):  # its layers would need a mask of their own
        ways[f"{sinks} sinks, positions of the text"] = lambda reading: scoring.without_new_positions(reading, sinks)
    return ways


def _has_shorter_window(model: Any, window_length: int) -> bool:
    sliding_window = getattr(model.config.get_text_config(decoder=True), "sliding_window", None)
    return sliding_window is not None and sliding_window < window_length


def _token_ids(loaded: Loaded, text: str, plan: Plan) -> torch.Tensor:
    ids = torch.tensor(loaded.tokenizer(text)["input_ids"])  # [tokens of the text]
    if len(ids) < plan.tokens:
        raise SinkArgumentError(f"The text has {len(ids)} tokens, but tokens={plan.tokens}. Ask for fewer.")
    return ids[: plan.tokens]
