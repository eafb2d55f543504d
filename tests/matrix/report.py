"""The output of the matrix: a line for each version, a table, failures by name, and every reason for a skip."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from tests.matrix.records import NO_ENVIRONMENT, TOO_LONG, Record

COLUMNS = ("transformers", "tests", "passed", "failed", "skipped", "families exact", "refused by name")
BEGIN, END = "<!-- matrix -->", "<!-- /matrix -->"
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
    return f"transformers {record.version} ({record.suite}): {counts}{state}"


def state_of(record: Record) -> str:
    """Why a record is not good."""
    return STATES.get(record.exit_code, f"pytest ended with {record.exit_code}")


def bad(record: Record) -> int:
    """Failures and errors."""
    return record.failed + record.errors


def table(records: Iterable[Record]) -> str:
    """A Markdown table with a row for each version."""
    rows = [COLUMNS, ["---"] * len(COLUMNS), *map(cells, records)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


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


def with_table(text: str, new: str) -> str:
    """A text in which the table between the two marks is replaced.

    Raises:
        ValueError: the text does not contain the two marks once each, in their order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in before + after:
        raise ValueError(f"The text must contain {BEGIN} and {END} once, in this order")
    return f"{before}{BEGIN}\n{new}\n{END}{after}"
