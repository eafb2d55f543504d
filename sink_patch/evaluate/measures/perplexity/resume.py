"""The file of a measurement that is written as it goes, and from which the same command goes on."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sink_patch.errors import SinkArgumentError
from sink_patch.evaluate.measures import records
from sink_patch.evaluate.measures.perplexity import figures
from sink_patch.evaluate.measures.perplexity.figures import Row
from sink_patch.evaluate.measures.perplexity.plan import SINKS, WAYS, Plan
from sink_patch.evaluate.measures.records import Record

MEASURE = "perplexity"
_IDENTITY = ("model", "model_type", "weights", "dtype", "text", "ids", *("window_length", "num_sink_tokens"))
_PLAN = ("tokens", "every", "dense_tokens")


class Results:
    """The rows of a measurement, and their file.

    Args:
        path: of the file, which may be there; None: none is read or written.
        plan: what is read.

    Raises:
        SinkArgumentError: the file is of something else.
    """

    def __init__(self, path: Path | None, plan: Plan):
        self._path, self._plan = path, plan
        self.record: Record = {"measure": MEASURE}
        self.rows: dict[str, Row] = {}
        if path is not None and path.exists():
            self.record = records.read(path)
            if self.record["measure"] != MEASURE:
                raise SinkArgumentError(f"{path} holds a record of {self.record['measure']!r}. Give another --json.")
            self.rows = {row["way"]: Row.from_dict(row) for row in self.record["rows"]}

    def must_be(self, **facts: Any) -> None:
        """Hold facts against those of the file, and keep them.

        Raises:
            SinkArgumentError: a text, a model or a plan that differs, named.
        """
        for name, value in facts.items():
            before = self.record.get(name, value)
            if name in (*_IDENTITY, *_PLAN, "versions") and before != value:
                raise SinkArgumentError(
                    f"{self._path} holds figures with another {name}: {_short(before)}, and this is {_short(value)}. "
                    "Give another file, or delete this one to begin anew."
                )
        self.record.update({name: value for name, value in facts.items() if name not in self.record})

    @property
    def end(self) -> int:
        """How many tokens are read in the ways that read all."""
        return self._plan.end(SINKS)

    def row(self, way: str) -> Row:
        """The row of a way, as far as it has come."""
        return self.rows.setdefault(way, Row(way, self._plan.name(way), self._plan.end(way)))

    def table_rows(self) -> list[Row]:
        """All rows that there are, in the order of tables."""
        return [self.rows[way] for way in WAYS if way in self.rows]

    def state(self, row: Row) -> Path | None:
        """The file from which a row goes on; None: none.

        Raises:
            SinkArgumentError: it is gone.
        """
        if self._path is None or row.state is None:
            return None
        path = self._path.with_name(row.state)
        if not path.is_file():
            raise SinkArgumentError(f"{path} is missing, with which {self._path} goes on. Delete this one, too.")
        return path

    def save(self, row: Row, way: Any) -> None:
        """Write the file, and beside it what `way` needs to go on with `row`, unless it is done.

        The state is named after its token and written first, so that a crash between the two leaves a pair that fits.
        """
        if self._path is None:
            return
        row.state = None
        if not row.done:
            name = f"{self._path.name}.{row.way}-{row.read}.safetensors"
            row.state = name if way.save(self._path.with_name(name)) else None
        self.write()
        for other in self._path.parent.iterdir():  # also what a crash has left
            ours = other.name.startswith(f"{self._path.name}.{row.way}-") and other.suffix == ".safetensors"
            if ours and other.name != row.state:
                other.unlink()

    def write(self) -> None:
        """Write the file alone."""
        if self._path is not None:
            records.write(self._path, self.as_record())

    @contextmanager
    def kept_if_stopped(self) -> Iterator[None]:
        """Say after Ctrl-C how to go on."""
        try:
            yield
        except KeyboardInterrupt:
            if self._path is not None and self._path.exists():
                print(f"\n{self._path} keeps what was read. The same command goes on from there.", file=sys.stderr)
            raise

    def as_record(self) -> Record:
        """All of it for JSON."""
        rows = self.table_rows()
        size = figures.stretch(self._plan.window_length, self._plan.every, len(self._plan.positions))
        facts = {key: value for key, value in self.record.items() if key != "rows"}
        return {
            **facts,
            "scored_positions": len(self._plan.positions),
            "stretch_scores": size,
            "done": all(row.done for row in rows),
            "rows": _dicts(rows, size),
        }


def _dicts(rows: Sequence[Row], size: int) -> list[Record]:
    return [row.as_dict(figures.reference(rows), size) for row in rows]


def _short(value: Any) -> str:
    """A value for a message: of a text its name and the beginning of its sha256."""
    if isinstance(value, dict):
        return " ".join(str(part)[:24] for part in value.values())
    return str(value)[:24]
