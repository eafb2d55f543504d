"""The measures that ask in a stream: what is read, in which ways, and what is written down of it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

import sink_patch
from sink_patch.arguments import Sizes
from sink_patch.errors import SinkArgumentError
from sink_patch.evaluate import models
from sink_patch.evaluate.measures import picture, plots, records
from sink_patch.evaluate.measures.records import Record
from sink_patch.evaluate.models import Loaded
from sink_patch.evaluate.recall import asking, figures
from sink_patch.evaluate.recall.scripts import chat, lines, questions
from sink_patch.evaluate.recall.scripts.script import Part, beginning

_WAYS = ("sinks", "window", "dense", "alone", "system")


@dataclass(frozen=True)
class _Way:
    """A way to read the stream: its name in the table, its window and sinks, and what reads."""

    name: str
    window: tuple[int, int]
    read: Callable[[], list[asking.Answer]]


@dataclass(frozen=True)
class Common:
    """What all of these measures are told.

    Args:
        model, dtype: as for `models.load`.
        sizes: of the sink cache.
        ways: how the stream is read, by name.
        dense_parts: how many parts the dense cache reads at most.
        json, plot: files to write; None: none.

    Raises:
        SinkArgumentError: impossible sizes, an unknown way, a file that cannot be written.
        SinkPatchError: matplotlib is needed and not installed.
    """

    model: str
    dtype: str
    sizes: Sizes
    ways: tuple[str, ...]
    dense_parts: int
    json: Path | None = None
    plot: Path | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.ways if name not in _WAYS]
        if unknown:
            raise SinkArgumentError(
                f"ways={','.join(self.ways)}: {unknown[0]!r} is not known. Use {', '.join(_WAYS[:4])}."
            )
        if self.dense_parts < 1 and "dense" in self.ways:
            raise SinkArgumentError(
                f"The dense cache would read {self.dense_parts} lines. Give 1 or more, or leave it out."
            )
        records.check_writable(self.json)
        plots.check(self.plot)

    @classmethod
    def of(cls, arguments: argparse.Namespace, ways: Sequence[str], dense_parts: int) -> Common:
        sizes = Sizes(arguments.window_length, arguments.num_sink_tokens)
        return cls(arguments.model, arguments.dtype, sizes, tuple(ways), dense_parts, arguments.json, arguments.plot)

    @property
    def window(self) -> tuple[int, int]:
        return self.sizes.window_length, self.sizes.num_sink_tokens


def streameval(common: Common, windows: int, distances: tuple[int, ...], every: int) -> None:
    """The command `streameval` with lines: measure, print a table, write what was asked for.

    Raises:
        SinkArgumentError: impossible sizes, or nothing would be asked.
        UnsupportedModelError: the model cannot stream.
    """
    if "alone" in common.ways:
        raise SinkArgumentError("ways=alone needs --questions: without the stream nobody knows what its lines say.")
    plan = lines.Plan(windows * common.sizes.window_length, distances, every)
    loaded = models.load(common.model, common.dtype)
    parts = lines.parts(loaded.tokenizer, plan)
    about = {"lines": len(parts), "windows": windows, "every": every, "seed": plan.seed, "group_name": "lines back"}
    _measure(common, loaded, "streameval", parts, about)


def questions_of_a_file(common: Common, path: Path) -> None:
    """The command `streameval --questions FILE`.

    Raises:
        SinkArgumentError: impossible sizes, or a file without questions.
        UnsupportedModelError: the model cannot stream.
    """
    items = questions.read(path)
    loaded = models.load(common.model, common.dtype)
    parts = questions.parts(loaded.tokenizer, items)
    about = {"questions": records.about_text(path, records.read_text(path)), "group_name": "asked"}
    _measure(common, loaded, "questions", parts, about)


def recall(common: Common, messages: int, distances: tuple[int, ...], every: int) -> None:
    """The command `recall`.

    Raises:
        SinkArgumentError: impossible sizes, nothing would be asked, or a model without a chat template.
        UnsupportedModelError: the model cannot stream.
    """
    plan = chat.Plan(messages, distances, every)
    loaded = models.load(common.model, common.dtype)
    parts, system = chat.parts(loaded.tokenizer, plan)
    about = {"messages": messages, "every": every, "seed": plan.seed, "system_tokens": system}
    _measure(common, loaded, "recall", parts, {**about, "group_name": "messages back"}, system)


def _measure(
    common: Common, loaded: Loaded, measure: str, parts: Sequence[Part], about: Record, system: int = 0
) -> None:
    """Read the parts in all ways, and say what was found."""
    ways = _ways(common, loaded, parts, system)
    record: Record = {
        "measure": measure,
        **records.about(loaded),
        "window_length": common.sizes.window_length,
        "num_sink_tokens": common.sizes.num_sink_tokens,
        "tokens": sum(len(part.ids) for part in parts),
        **about,
        "rows": _rows(ways),
    }
    tokens, window_length = record["tokens"], common.sizes.window_length
    size = f"{tokens} tokens, {tokens / window_length:.1f} windows of {window_length}"
    print(f"{loaded.name}: a stream of {size}\n\n{figures.table(record)}")
    if common.json is not None:
        records.write(common.json, record)
    if common.plot is not None:
        picture.draw([record], common.plot)


def _ways(common: Common, loaded: Loaded, parts: Sequence[Part], system: int) -> list[_Way]:
    """What each way does. Impossible sizes are refused here, before the long work."""
    model, (window, sinks) = loaded.model, common.window
    caches = {"sinks": (f"{sinks} sinks", sinks), "window": ("0 sinks", 0), "system": ("system message kept", system)}
    found: list[_Way] = []
    for way in common.ways:
        if way in caches:
            name, number = caches[way]
            cache = sink_patch.SinkCache(window, number, model=model)
            found.append(_Way(name, (window, number), _in_one_stream(common, model, cache, parts, name)))
        elif way == "dense":
            few = asking.within(parts[: common.dense_parts], asking.context(model))
            found.append(_Way(figures.DENSE, common.window, _in_one_stream(common, model, None, few, figures.DENSE)))
        else:
            found.append(_Way("one by one", common.window, _one_by_one(loaded, parts)))
    return found


def _in_one_stream(
    common: Common, model: Any, cache: Any, parts: Sequence[Part], name: str
) -> Callable[[], list[asking.Answer]]:
    longest = max(1, common.sizes.window_length // 2)
    return lambda: asking.in_one_stream(model, cache, tqdm(parts, desc=name), longest)


def _one_by_one(loaded: Loaded, parts: Sequence[Part]) -> Callable[[], list[asking.Answer]]:
    start = beginning(loaded.tokenizer)
    return lambda: asking.one_by_one(loaded.model, start, tqdm(parts, desc="one by one"))


def _rows(ways: Sequence[_Way]) -> list[Record]:
    """The figures of all ways. Where the dense cache ends earlier, the others are also given up to there."""
    read: list[tuple[_Way, list[asking.Answer], float]] = []
    for way in ways:
        started = time.perf_counter()
        answers = way.read()
        read.append((way, answers, time.perf_counter() - started))
    rows = [figures.row(way.name, answers, way.window, seconds) for way, answers, seconds in read if answers]
    few = min((len(answers) for _, answers, _ in read), default=0)
    for way, answers, _ in read:
        if few and len(answers) > few:
            rows.append(figures.row(f"{way.name}, {figures.AS_FAR}", answers[:few], way.window, None))
    return rows
