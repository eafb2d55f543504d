"""Perplexities of several ways to read one text: as a table, for JSON, and as a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sink_patch.evaluate.measures.plots import Curve, Panel
from sink_patch.evaluate.measures.records import Record

_STRETCH_WINDOWS = 4  # perplexity is also given for each stretch of this many windows,
_SCORES_OF_A_STRETCH = 64  # but over this many scores at least,
_MOST_STRETCHES = 50
_DIGITS = 5
_LABELS = {"window": "window, no sinks", "text-positions": "sinks, positions of the text"}
"""Of curves, which have one label whatever the sizes, so that records of several sizes share their colours."""


@dataclass(eq=False)
class Row:
    """The result of one way of reading, as far as it has come.

    Args:
        way: one of `plan.WAYS`.
        name: for people.
        end: how many tokens it reads.
        read: how many of them it has read.
        seconds: that it took.
        scores: negative log-likelihoods in nats of the scored positions, the first ones.
        state: name of the file from which it goes on; None: none.
        note: what is to be said of it.
    """

    way: str
    name: str
    end: int
    read: int = 0
    seconds: float = 0.0
    scores: list[float] = field(default_factory=list)
    state: str | None = None
    note: str | None = None

    def add(self, scores: Sequence[float], read: int, seconds: float) -> None:
        """Scores of one more piece. They are rounded at once: a run that goes on in a file has the same."""
        self.scores += [round(score, _DIGITS) for score in scores]
        self.read, self.seconds = read, self.seconds + seconds

    @property
    def done(self) -> bool:
        return self.read >= self.end

    @property
    def perplexity(self) -> float:
        """Perplexity over all positions."""
        return _perplexity(self.scores)

    def ratio_to(self, other: Row) -> tuple[float, float]:
        """Perplexity divided by that of another row, over the positions that both have, and its standard error."""
        shared = min(len(self.scores), len(other.scores))
        differences = [mine - theirs for mine, theirs in zip(self.scores[:shared], other.scores[:shared], strict=True)]
        if not differences:
            return math.nan, math.nan
        ratio = math.exp(statistics.fmean(differences))
        error = statistics.stdev(differences) / shared**0.5 if shared > 1 else 0.0
        return ratio, ratio * error

    def as_dict(self, first: Row, size: int) -> dict[str, Any]:
        """The row for JSON; `first` is the row that all are compared with, `size` the scores of a stretch."""
        ratio, error = self.ratio_to(first)
        figures: dict[str, Any] = {}
        if self.scores:
            figures = {
                "perplexity": round(self.perplexity, 4),
                "ratio": None if math.isnan(ratio) else round(ratio, 4),
                "ratio_to": first.way,
                "standard_error": None if math.isnan(error) else round(error, 4),
                "perplexity_by_stretch": [
                    round(_perplexity(self.scores[start:end]), 3) for start, end in _bounds(len(self.scores), size)
                ],
            }
        own = {"way": self.way, "name": self.name, "end": self.end, "read": self.read, "done": self.done}
        optional = {key: value for key in ("note", "state") if (value := getattr(self, key)) is not None}
        return {**own, **optional, "seconds": round(self.seconds, 1), **figures, "scores": self.scores}

    @classmethod
    def from_dict(cls, row: Record) -> Row:
        """The row that `as_dict` was."""
        names = ("way", "name", "end", "read", "seconds", "scores", "state", "note")
        return cls(**{name: row[name] for name in names if name in row})


def stretch(window_length: int, every: int, scores: int) -> int:
    """How many scores one point of a curve stands for."""
    wanted = (_STRETCH_WINDOWS * window_length // every, _SCORES_OF_A_STRETCH, math.ceil(scores / _MOST_STRETCHES))
    return max(1, min(max(wanted), max(scores // 4, 1)))


def reference(rows: Sequence[Row]) -> Row:
    """The row that the others are compared with: the exact one, or else the first."""
    return next((row for row in rows if row.way == "recomputed" and row.scores), rows[0])


def table(rows: Sequence[Row]) -> str:
    """A table of perplexity, its ratio to that of the `reference` with the standard error, tokens and seconds."""
    first, width = reference(rows), max(len(row.name) for row in rows)
    head = f"to {first.name}"
    lines = [f"{'':{width}}  perplexity  {head:>18}  {'tokens':>9}  {'seconds':>8}"]
    for row in rows:
        ratio, error = row.ratio_to(first)
        own, compared = (f"{row.perplexity:.3f}", f"{ratio:.3f} +- {error:.3f}") if row.scores else ("-", "-")
        lines.append(f"{row.name:{width}}  {own:>10}  {compared:>18}  {row.read:>9,}  {row.seconds:8.0f}")
    return "\n".join([*lines, *(f"{row.name}: {row.note}." for row in rows if row.note)])


def panels(record: Record) -> list[Panel]:
    """The curves of a record: perplexity over tokens, each point over a stretch of the text."""
    every, size, curves = record["every"], record["stretch_scores"], []
    for row in record["rows"]:
        bounds = _bounds(len(row["scores"]), size)
        middles = [record["window_length"] + every * (start + end) / 2 for start, end in bounds]
        if bounds:
            curves.append(Curve(_LABELS.get(row["way"], row["way"]), middles, row["perplexity_by_stretch"]))
    values = [value for curve in curves for value in curve.y]
    context = record["context_length"]
    shown = bool(curves) and context < record["tokens"]
    return [
        Panel(
            title=f"Perplexity of {record['text']['name']}",
            x_label=f"tokens (a point: {every * size:,} of them)",
            y_label="perplexity",
            curves=tuple(curves),
            log_y=bool(values) and max(values) > 3 * min(values),
            marks=((context, "trained context"),) if shown else (),
        )
    ]


def _perplexity(scores: Sequence[float]) -> float:
    return math.exp(min(statistics.fmean(scores), 700.0))  # of which exp is no infinity yet


def _bounds(count: int, size: int) -> list[tuple[int, int]]:
    """Where stretches of `size` scores begin and end; a short rest goes with the one before."""
    starts = [start for start in range(0, count, size) if start == 0 or start + size // 2 < count]
    return list(zip(starts, [*starts[1:], count], strict=True)) if count else []
