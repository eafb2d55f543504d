"""Does a model stay fluent in a stream far longer than the window?

Its perplexity is compared with that of sliding-window recomputation (arXiv 2309.17453, section 4.1), which is slow and
exact. With sinks the two should be close; without sinks perplexity should be far higher. The dense cache forgets
nothing, so that it is better until the text is longer than the model's trained context.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import sink_patch
from sink_patch.errors import SinkArgumentError
from sink_patch.evaluate.measures import records
from sink_patch.evaluate.measures.perplexity import figures, masked, scoring
from sink_patch.evaluate.measures.perplexity.figures import Row
from sink_patch.evaluate.measures.perplexity.plan import (
    DENSE,
    IN_ORDER,
    RECOMPUTED,
    SINKS,
    TEXT_POSITIONS,
    WINDOW,
    Plan,
)
from sink_patch.evaluate.measures.perplexity.resume import Results
from sink_patch.evaluate.models import Loaded

SAVE_SECONDS = 10.0  # between two times that the file is written
_SPECIAL_TOKENS = 16  # that a tokenizer may add to a text, at most


@dataclass(frozen=True)
class Job:
    """A text that can be read, the plan, and the file."""

    text: str
    plan: Plan
    results: Results


def prepare(text_file: Path, plan: Plan, json_file: Path | None, model: str, dtype: str) -> Job:
    """All that can be checked before a model is loaded.

    Raises:
        SinkArgumentError: a file cannot be read or written or holds something else, or the text is too short.
    """
    text = records.read_text(text_file)
    records.check_writable(json_file)
    most = len(text.encode()) + _SPECIAL_TOKENS
    if most < plan.tokens:  # a token has a byte at least
        raise SinkArgumentError(f"The text has {most} tokens at most, but tokens={plan.tokens}. Ask for fewer.")
    results = Results(json_file, plan)
    results.must_be(
        model=Path(model).name,
        dtype=dtype,
        text=records.about_text(text_file, text),
        window_length=plan.window_length,
        num_sink_tokens=plan.num_sink_tokens,
        tokens=plan.tokens,
        every=plan.every,
        dense_tokens=plan.dense_tokens,
    )
    return Job(text, plan, results)


def measure(loaded: Loaded, job: Job) -> list[Row]:
    """Read the text in all ways that are not done yet, with a progress bar on stderr for each.

    Raises:
        SinkArgumentError: the text is too short, or the file is of another model.
        UnsupportedModelError: the model cannot stream.
    """
    plan, results = job.plan, job.results
    ids = _token_ids(loaded, job.text, plan)
    report = sink_patch.inspect(loaded.model, plan.window_length, plan.num_sink_tokens)
    results.must_be(**records.about(loaded), context_length=report.context_length, ids=_digest(ids))
    reading = scoring.Reading(loaded.model, ids, plan.positions, plan.window_length)
    rows = [row for way in IN_ORDER if way in plan.ways and not (row := results.row(way)).done]
    with torch.inference_mode(), results.kept_if_stopped():
        masks_differ = any(row.way in (WINDOW, TEXT_POSITIONS) for row in rows) and masked.disagreement(reading)
        for row in rows:
            way = _way(row, reading, plan, loaded, masks_differ or None)
            if way is not None:
                _read(way, row, results)
    results.write()
    return results.table_rows()


def report(loaded_name: str, job: Job) -> str:
    """The table, with what was read above it."""
    plan, text = job.plan, job.results.record["text"]["name"]
    return (
        f"{loaded_name}, {text}: {plan.tokens} tokens, window of {plan.window_length}, {len(plan.positions)} positions "
        f"scored\n\n{figures.table(job.results.table_rows())}"
    )


def _way(row: Row, reading: scoring.Reading, plan: Plan, loaded: Loaded, no_mask: str | None) -> scoring.Way | None:
    """The way of a row; None: this model cannot be read so, and the row says why."""
    sinks = plan.num_sink_tokens
    if row.way == RECOMPUTED:
        first = int(reading.ids[0])
        return scoring.Recomputed(reading, first if first == loaded.tokenizer.bos_token_id else None)
    if row.way == DENSE:
        return scoring.Dense(reading)
    if row.way == SINKS:
        return scoring.Streamed(reading, sinks)
    if no_mask is None:
        return masked.Masked(reading, 0 if row.way == WINDOW else sinks)
    if row.way == WINDOW:
        row.note = f"read token by token, as {no_mask}"
        return scoring.Streamed(reading, 0)
    row.note, row.end = f"left out, as {no_mask}", 0
    return None


def _read(way: scoring.Way, row: Row, results: Results) -> None:
    """Read what is left of a row, and write the file now and then."""
    way.resume(results.state(row), row.read)
    saved = time.perf_counter()
    with tqdm(total=row.end, initial=row.read, desc=row.name, unit="token") as bar:
        while not row.done:
            started, stop = time.perf_counter(), way.piece(row.read, row.end)
            scores = way.read(row.read, stop)
            bar.update(stop - row.read)
            now = time.perf_counter()
            row.add(scores.tolist(), stop, now - started)
            if isinstance(way, scoring.Dense) and row.done and row.end < results.end:
                row.note = (
                    f"stopped after {row.end:,} tokens, where its cache holds {way.nbytes / 1e6:,.0f} MB; "
                    "--dense-tokens goes farther"
                )
            if row.done or now - saved >= SAVE_SECONDS:
                results.save(row, way)
                saved = time.perf_counter()


def _token_ids(loaded: Loaded, text: str, plan: Plan) -> torch.Tensor:
    ids = torch.tensor(loaded.tokenizer(text)["input_ids"])  # [tokens of the text]
    if len(ids) < plan.tokens:
        raise SinkArgumentError(f"The text has {len(ids)} tokens, but tokens={plan.tokens}. Ask for fewer.")
    return ids[: plan.tokens]


def _digest(ids: torch.Tensor) -> str:
    """By which two tokenizers of one text differ."""
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]
