"""The output of the matrix: a line for each version, a table, failures by name, and every reason for a skip."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from tests.matrix.records import NO_ENVIRONMENT, TOO_LONG, Record

COLUMNS = ("transformers", "tests", "passed", "failed", "skipped", "families exact", "refused by name")
COLUMNS_OF_OTHERS = ("torch", "Python", *COLUMNS[:5])
STATES = {
    0: "no test passed",
    NO_ENVIRONMENT: "its environment could not be created",
    TOO_LONG: "pytest did not end in time",
    1: "tests failed",
    5: "no test was found",
}


def line(record: Record) -> str:
    """The closing line of one version."""
    counts = f"{record.passed} passed, {bad(record)} failed, {record.skipped} skipped in {record.seconds:.0f} s"
    state = "" if record.is_good else f" [{state_of(record)}]"
    others = f" with torch {record.torch} on Python {record.python}" if record.is_beside_others else ""
    return f"transformers {record.version}{others} ({record.suite}): {counts}{state}"


def state_of(record: Record) -> str:
    """Why a record is not good."""
    return STATES.get(record.exit_code, f"pytest ended with {record.exit_code}")


def bad(record: Record) -> int:
    """Failures and errors."""
    return record.failed + record.errors


def tables(records: Sequence[Record]) -> dict[str, str]:
    """The tables for which there are records: "matrix" with the torch and the Python of CI, "torch" with others."""
    usual = [record for record in records if not record.is_beside_others]
    others = sorted((record for record in records if record.is_beside_others), key=lambda record: record.key[1:])
    found = {"matrix": table(usual) if usual else "", "torch": table_of_others(others) if others else ""}
    return {name: text for name, text in found.items() if text}


def table(records: Iterable[Record]) -> str:
    """A Markdown table with a row for each version."""
    return markdown([COLUMNS, *map(cells, records)])


def table_of_others(records: Iterable[Record]) -> str:
    """The same for other versions of torch and Python."""
    rows = ([record.torch, record.python, *cells(record)[:5]] for record in records)
    return markdown([COLUMNS_OF_OTHERS, *rows])


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of rows; the first is its head."""
    head, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))


def cells(record: Record) -> list[str]:
    """A row of the table; a dash for what was not tested."""
    numbers = (record.passed, bad(record), record.skipped, record.exact, record.refused)
    return [record.version, record.suite, *("-" if number is None else f"{number:,}" for number in numbers)]


def failures(records: Iterable[Record]) -> Iterator[str]:
    """The tests that failed, by name, under the closing line of their version."""
    for record in records:
        if not record.is_good:
            yield line(record)
            yield from (f"  {name}: {message}" for name, message in record.bad.items())


def reasons(records: Sequence[Record]) -> Iterator[str]:
    """Every reason for a skip: on how many versions, and how many tests in all."""
    tests: Counter[str] = Counter()
    versions: Counter[str] = Counter()
    for record in records:
        tests.update(record.reasons)
        versions.update(record.reasons.keys())
    for reason, count in tests.most_common():
        yield f"{count:6,} on {versions[reason]:2} of {len(records)} versions: {reason}"


def closing_line(records: Sequence[Record]) -> str:
    """All versions together, in the words of pytest; a version that completed no test counts as a failure."""
    without_tests = sum(not record.is_good and not bad(record) for record in records)
    failed = sum(map(bad, records)) + without_tests
    return (
        f"{sum(record.passed for record in records)} passed, {failed} failed, "
        f"{sum(record.skipped for record in records)} skipped"
    )


def with_tables(text: str, new: Mapping[str, str]) -> str:
    """A text in which each table with a name, between two marks, is replaced; the others stay as they are.

    Raises:
        ValueError: the text does not contain the two marks of a name once each, in their order.
    """
    for name, rows in new.items():
        first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, begin, rest = text.partition(first)
        _, end, after = rest.partition(last)
        if not begin or not end or first in after or last in before + after:
            raise ValueError(f"The text must contain {first} and {last} once, in this order")
        text = f"{before}{first}\n{rows}\n{last}{after}"
    return text
