"""Perplexities of several ways to read one text: as a table, and as JSON."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import sink_patch
from sink_patch.arguments import Sizes
from sink_patch.errors import SinkArgumentError
from sink_patch.evaluate.models import Loaded

_STRETCH_WINDOWS = 4  # perplexity is also given for each stretch of this many windows
_SIZES = Sizes()


@dataclass(frozen=True)
class Plan:
    """What is read and where it is scored.

    Args:
        window_length: tokens in the window, including the sinks.
        num_sink_tokens: first tokens that stay in the window.
        tokens: how many tokens of the text are read.
        every: every so many positions past the first window, one is scored.

    Raises:
        SinkArgumentError: nothing would be scored.
    """

    window_length: int = _SIZES.window_length
    num_sink_tokens: int = _SIZES.num_sink_tokens
    tokens: int = 4096
    every: int = 8

    def __post_init__(self) -> None:
        if self.every < 1:
            raise SinkArgumentError(f"every={self.every}: give 1 to score each position, 8 for every eighth.")
        if self.tokens < self.window_length + 2:
            raise SinkArgumentError(
                f"tokens={self.tokens} does not reach past a window of {self.window_length}. Read "
                f"{self.window_length + 2} tokens or more; with fewer than 4 windows the figures mean little."
            )

    @property
    def positions(self) -> range:
        """Positions whose next token is scored."""
        return range(self.window_length, self.tokens - 1, self.every)


@dataclass(frozen=True, eq=False)
class Row:
    """The result of one way of reading.

    Args:
        mode: the name of the way.
        scores: negative log-likelihoods in nats, shape [positions].
        seconds: that it took.
    """

    mode: str
    scores: torch.Tensor
    seconds: float

    @property
    def perplexity(self) -> float:
        """Perplexity over all positions."""
        return _perplexity(self.scores)

    def ratio_to(self, other: Row) -> tuple[float, float]:
        """Perplexity divided by that of another row over the same positions, and the standard error of this ratio."""
        difference = (self.scores - other.scores).double()
        ratio = float(difference.mean().exp())
        error = float(difference.std()) / len(difference) ** 0.5 if len(difference) > 1 else 0.0
        return ratio, ratio * error

    def as_dict(self, first: Row, plan: Plan) -> dict[str, Any]:
        """The row for JSON; `first` is the row that all are compared with."""
        size = max(1, _STRETCH_WINDOWS * plan.window_length // plan.every)
        stretches: tuple[torch.Tensor, ...] = torch.split(self.scores, size)
        ratio, error = self.ratio_to(first)
        return {
            "mode": self.mode,
            "perplexity": round(self.perplexity, 4),
            "to_recomputed": round(ratio, 4),
            "standard_error": round(error, 4),
            "perplexity_by_stretch": [round(_perplexity(stretch), 3) for stretch in stretches],
            "seconds": round(self.seconds, 1),
        }


def table(rows: list[Row]) -> str:
    """A table of perplexity, its ratio to the first row's with the standard error, and seconds."""
    width = max(len(row.mode) for row in rows)
    lines = [f"{'':{width}}  perplexity     to recomputed   seconds"]
    for row in rows:
        ratio, error = row.ratio_to(rows[0])
        lines.append(f"{row.mode:{width}}  {row.perplexity:10.3f}  {ratio:7.3f} +- {error:5.3f}  {row.seconds:8.0f}")
    return "\n".join(lines)


def as_dict(rows: list[Row], loaded: Loaded, text_file: Path, plan: Plan) -> dict[str, Any]:
    """The rows for JSON, with all that is needed to reproduce them: file names only, no paths of this machine."""
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
        "rows": [row.as_dict(rows[0], plan) for row in rows],
    }


def _perplexity(scores: torch.Tensor) -> float:
    return float(scores.double().mean().exp())


def _versions() -> dict[str, str]:
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sink_patch": sink_patch.__version__,
    }
