"""What was answered, as a record, a table, and panels of a picture. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from sink_patch.evaluate.measures.plots import Curve, Panel
from sink_patch.evaluate.measures.records import Record
from sink_patch.evaluate.recall.scripts.script import EDGE, INSIDE, OUTSIDE

if TYPE_CHECKING:
    from sink_patch.evaluate.recall.asking import Answer

_STRETCHES = 10  # of a stream, for accuracy over it
DENSE = "dense"
AS_FAR = "as far as dense"
"""Names the figures of a way at the questions alone that the dense cache has come to."""


def row(way: str, answers: Sequence[Answer], window: tuple[int, int], seconds: float | None) -> Record:
    """The figures of one way to read the stream.

    Args:
        way: its name.
        answers: in the order of the stream.
        window: tokens in the window, and how many of them are sinks; of other ways, those of the sink cache.
        seconds: that it took; None: it is a part of another row.
    """
    groups = list(dict.fromkeys(answer.question.group for answer in answers))
    places = [answer.question.place(answer.read, *window) for answer in answers]
    return {
        "way": way,
        "seconds": None if seconds is None else round(seconds, 1),
        "tokens": max((answer.read for answer in answers), default=0),
        "groups": [
            _figures(answers, group, places, [answer.question.group == group for answer in answers]) for group in groups
        ],
    }


def _figures(answers: Sequence[Answer], group: int | str, places: Sequence[str], of_group: Sequence[bool]) -> Record:
    found = [(answer, place) for answer, place, here in zip(answers, places, of_group, strict=True) if here]
    own = [answer for answer, _ in found]
    return {
        "group": group,
        "places": {name: sum(place == name for _, place in found) for name in (INSIDE, EDGE, OUTSIDE)},
        **summary(own),
        "over_the_stream": _over_the_stream(own, max(answer.read for answer in answers)),
    }


def summary(answers: Sequence[Answer]) -> Record:
    """Of some answers: how many, and the shares that are right, as the model writes them and as it chooses."""
    count = len(answers)
    return {
        "questions": count,
        "exact": round(sum(answer.exact for answer in answers) / count, 4),
        "chosen": round(sum(answer.chosen for answer in answers) / count, 4),
        "log_probability": round(sum(answer.scores[0] for answer in answers) / count, 3),
    }


def _over_the_stream(answers: Sequence[Answer], end: int) -> list[list[float]]:
    """(tokens read, share exact, share chosen) of each stretch in which something was asked."""
    size = max(1, -(-end // _STRETCHES))
    found = []
    for start in range(0, end + 1, size):
        here = [answer for answer in answers if start <= answer.read < start + size]
        if here:
            part = summary(here)
            found.append([min(start + size, end), part["exact"], part["chosen"]])
    return found


def table(record: Record) -> str:
    """A line for each way and group."""
    width = max(len(row["way"]) for row in record["rows"])
    head = record["group_name"]
    lines = [f"{head:>16}  {'':{width}}  questions  in the window   exact  chosen  log-probability"]
    for group in _groups(record["rows"]):
        for one in record["rows"]:
            for found in one["groups"]:
                if found["group"] == group:
                    inside = found["places"][INSIDE] / found["questions"]
                    lines.append(
                        f"{group!s:>16}  {one['way']:{width}}  {found['questions']:9}  {inside:13.0%}  "
                        f"{found['exact']:6.1%}  {found['chosen']:6.1%}  {found['log_probability']:15.2f}"
                    )
    return "\n".join(lines)


def _groups(rows: Iterable[Record]) -> list[int | str]:
    return list(dict.fromkeys(found["group"] for row in rows for found in row["groups"]))


def panels(record: Record) -> list[Panel]:
    """What is drawn of a record: answers over the stream, and over distance where that was asked for."""
    rows = [row for row in record["rows"] if AS_FAR not in row["way"]]
    over_distance = {field: _over_distance(record, rows, field) for field in _TITLES} if _distances(rows) else {}
    if record["measure"] == "questions":
        return [_over_stream(rows, *_PLACES["chosen"])]
    if record["measure"] == "recall":
        return list(over_distance.values())
    # of the dense cache the easiest questions alone: it shows whether a long text makes them harder
    of_stream = [{**row, "groups": row["groups"][:1]} if row["way"] == DENSE else row for row in rows]
    return [_over_stream(of_stream, *_PLACES["exact"]), over_distance["exact"], over_distance["chosen"]]


_TITLES = {
    "exact": "Right answers, as the model writes them",
    "chosen": "Right answers, as it chooses among 4",
    "log_probability": "Log-probability of the right answer",
}
_PLACES = {"exact": (1, "as the model writes them"), "chosen": (2, "as it chooses")}  # in what _over_the_stream gives


def _over_stream(rows: Sequence[Record], field: int, how: str) -> Panel:
    curves = [
        Curve(_label(row, found), [point[0] for point in stretch], [point[field] for point in stretch])
        for row in rows
        for found in row["groups"]
        for stretch in [found["over_the_stream"]]
    ]
    return Panel(f"Right answers over the stream, {how}", "tokens read", "share", tuple(curves), from_zero=True)


def _label(row: Record, found: Record) -> str:
    return f"{row['way']}, {found['group']} lines back" if isinstance(found["group"], int) else str(row["way"])


def _over_distance(record: Record, rows: Sequence[Record], field: str) -> Panel:
    """A curve for each way; what was asked about the system message does not depend on distance."""
    distances = _distances(rows)
    curves = []
    for row in rows:
        points = sorted((found["group"], found[field]) for found in row["groups"] if isinstance(found["group"], int))
        curves.append(Curve(row["way"], [x for x, _ in points], [y for _, y in points]))
        constant = [found[field] for found in row["groups"] if not isinstance(found["group"], int)]
        curves += [
            Curve(f"{row['way']}: of the system message", [distances[0], distances[-1]], [y, y]) for y in constant
        ]
    shares = field != "log_probability"
    y_label = "share" if shares else "nats"
    return Panel(_TITLES[field], record["group_name"], y_label, tuple(curves), log_x=True, from_zero=shares)


def _distances(rows: Sequence[Record]) -> list[int]:
    return sorted({found["group"] for row in rows for found in row["groups"] if isinstance(found["group"], int)})
