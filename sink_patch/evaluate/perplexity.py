"""`sink-patch perplexity`: does a model keep its fluency in a stream far longer than the window?

The yardstick is sliding-window recomputation (arXiv 2309.17453, section 4.1): slow and exact. With sinks the stream
should come close to it; without them it should be far off.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sink_patch.errors import SinkArgumentError
from sink_patch.evaluate import scoring
from sink_patch.evaluate.models import Loaded

_STRETCH_WINDOWS = 4  # perplexity is also given for each stretch of so many windows


@dataclass(frozen=True)
class Plan:
    """What is read and where it is scored: `tokens` ids, every `every`-th position past the first window."""

    window_length: int = 256
    num_sink_tokens: int = 4
    tokens: int = 4096
    every: int = 8

    def __post_init__(self) -> None:
        if self.every < 1:
            raise SinkArgumentError(f"every={self.every}: give 1 to score each position, 8 for every eighth.")
        if self.tokens < self.window_length + 2:
            raise SinkArgumentError(
                f"tokens={self.tokens} do not leave a window of {self.window_length}. Read at least "
                f"{self.window_length + 2} tokens; past 4 windows the figures begin to tell."
            )

    @property
    def positions(self) -> range:
        """Positions whose next token is scored."""
        return range(self.window_length, self.tokens - 1, self.every)


@dataclass(frozen=True)
class Row:
    """One way of reading: scores in nats, shape [positions], and what it cost."""

    mode: str
    scores: torch.Tensor
    seconds: float

    @property
    def perplexity(self) -> float:
        return _perplexity(self.scores)

    def ratio_to(self, other: Row) -> tuple[float, float]:
        """Perplexity as a multiple of another row's, and the standard error of that, both over the same positions."""
        difference = (self.scores - other.scores).double()
        ratio = float(difference.mean().exp())
        error = float(difference.std()) / len(difference) ** 0.5 if len(difference) > 1 else 0.0
        return ratio, ratio * error


def measure(loaded: Loaded, text: str, plan: Plan) -> list[Row]:
    """Read the text in four ways; the first row is recomputation.

    Raises:
        SinkArgumentError: the text is too short.
        UnsupportedModelError: the model cannot stream.
    """
    model, ids, positions = loaded.model, _token_ids(loaded, text, plan), plan.positions
    window, sinks = plan.window_length, plan.num_sink_tokens
    bos = int(ids[0]) if int(ids[0]) == loaded.tokenizer.bos_token_id else None
    ways: dict[str, Callable[[scoring.Progress], torch.Tensor]] = {
        "recomputed": lambda told: scoring.recomputed(model, ids, positions, window, bos, told),
        f"{sinks} sinks": lambda told: scoring.streamed(model, ids, positions, window, sinks, told),
        "0 sinks": lambda told: scoring.streamed(model, ids, positions, window, 0, told),
    }
    if not _has_shorter_window(model, window):  # its layers would need a mask of their own
        ways[f"{sinks} sinks, positions of the text"] = lambda told: scoring.without_new_positions(
            model, ids, positions, window, sinks, told
        )
    rows = []
    with torch.inference_mode():
        for mode, way in ways.items():
            started = time.perf_counter()
            scores = way(_reporter(mode))
            rows.append(Row(mode, scores, time.perf_counter() - started))
    return rows


def table(rows: list[Row]) -> str:
    """The rows for people: perplexity, its ratio to the first row's (and how sure that is), seconds that it took."""
    width = max(len(row.mode) for row in rows)
    lines = [f"{'':{width}}  perplexity     to recomputed   seconds"]
    for row in rows:
        ratio, error = row.ratio_to(rows[0])
        lines.append(f"{row.mode:{width}}  {row.perplexity:10.3f}  {ratio:7.3f} +- {error:5.3f}  {row.seconds:8.0f}")
    return "\n".join(lines)


def as_json(rows: list[Row], loaded: Loaded, text_file: Path, plan: Plan) -> dict[str, Any]:
    """The rows with all that is needed to run them again; names only, no path of this machine."""
    return {
        "model": loaded.name,
        "model_type": loaded.model.config.model_type,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "text": {"name": text_file.name, "sha256": hashlib.sha256(text_file.read_bytes()).hexdigest()},
        "window_length": plan.window_length,
        "num_sink_tokens": plan.num_sink_tokens,
        "tokens": plan.tokens,
        "every": plan.every,
        "scored_positions": len(plan.positions),
        "stretch_tokens": _STRETCH_WINDOWS * plan.window_length,
        "threads": torch.get_num_threads(),
        "versions": _versions(),
        "rows": [
            {
                "mode": row.mode,
                "perplexity": round(row.perplexity, 4),
                "to_recomputed": round(row.ratio_to(rows[0])[0], 4),
                "standard_error": round(row.ratio_to(rows[0])[1], 4),
                "perplexity_by_stretch": [round(value, 3) for value in _by_stretch(row.scores, plan)],
                "seconds": round(row.seconds, 1),
            }
            for row in rows
        ],
    }


def run(loaded: Loaded, text_file: Path, plan: Plan, json_file: Path | None) -> None:
    """The command: measure, print the table, and write JSON where asked.

    Raises:
        SinkArgumentError: the text cannot be read or is too short.
    """
    try:
        text = text_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as failure:
        raise SinkArgumentError(
            f"The text {str(text_file)!r} cannot be read: {failure}. Give a UTF-8 file."
        ) from failure
    rows = measure(loaded, text, plan)
    print(
        f"{loaded.name}, {text_file.name}: {plan.tokens} tokens in a window of {plan.window_length}, "
        f"{len(plan.positions)} positions scored\n\n{table(rows)}"
    )
    if json_file is not None:
        json_file.write_text(json.dumps(as_json(rows, loaded, text_file, plan), indent=1) + "\n", encoding="utf-8")


def _token_ids(loaded: Loaded, text: str, plan: Plan) -> torch.Tensor:
    ids = torch.tensor(loaded.tokenizer(text)["input_ids"])  # [tokens of the text]
    if len(ids) < plan.tokens:
        raise SinkArgumentError(f"The text has {len(ids)} tokens, but tokens={plan.tokens}. Ask for fewer.")
    return ids[: plan.tokens]


def _has_shorter_window(model: Any, window_length: int) -> bool:
    sliding_window = getattr(model.config.get_text_config(decoder=True), "sliding_window", None)
    return sliding_window is not None and sliding_window < window_length


def _by_stretch(scores: torch.Tensor, plan: Plan) -> list[float]:
    size = max(1, _STRETCH_WINDOWS * plan.window_length // plan.every)
    return [_perplexity(stretch) for stretch in scores.split(size)]


def _perplexity(scores: torch.Tensor) -> float:
    return float(scores.double().mean().exp())


def _reporter(mode: str) -> scoring.Progress:
    """Says on stderr how far a way has come, a few times."""
    told = 0

    def report(done: int, total: int) -> None:
        nonlocal told
        if done * 10 // total > told:
            told = done * 10 // total
            print(f"{mode}: {done} of {total}", file=sys.stderr, flush=True)

    return report


def _versions() -> dict[str, str]:
    import transformers

    import sink_patch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sink_patch": sink_patch.__version__,
    }
