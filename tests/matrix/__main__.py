"""Run the tests on each version of transformers; the exit code is 1 if any failed, or if a version ran none.

    python -m tests.matrix                                  all versions, the whole suite
    python -m tests.matrix --full 4.52.4 5.3.0 --quick      two versions in full, a quick selection on all others
    python -m tests.matrix --quick 5.0.0 --families         a quick selection and the proof of every architecture
    python -m tests.matrix --quick 5.4.0 --only tests/cache/test_cache.py
    python -m tests.matrix --full 5.4.0 --with old.json --readme    one version anew, and the table of all

Torch and the tools are those of the python that runs this: another torch is tested by running it with another python.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path

from packaging.version import InvalidVersion, Version

from tests.matrix.records import Record
from tests.matrix.report import closing_line, failures, line, reasons, table, with_table
from tests.matrix.runs import CHECKOUT, SUITES, Run, all_of
from tests.matrix.versions import VERSIONS


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    asked = parser().parse_args(arguments)
    records = []
    for record in all_of(runs(asked), asked.jobs):
        print(line(record), flush=True)
        records.append(record)
    records += earlier(asked.earlier, but_not={record.version for record in records})
    records.sort(key=lambda record: Version(record.version))
    tell(records)
    keep(records, asked)
    print(closing_line(records))
    return 0 if records and all(record.is_good for record in records) else 1


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    it = argparse.ArgumentParser(
        prog="python -m tests.matrix", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    it.add_argument(
        "--full", nargs="+", type=version, default=[], metavar="V", help="the whole suite on these versions"
    )
    it.add_argument("--all-full", action="store_true", help="the whole suite on all versions (also if none is named)")
    it.add_argument(
        "--quick",
        nargs="*",
        type=version,
        metavar="V",
        help="a quick selection on these; on all others if none is named",
    )
    it.add_argument(
        "--only", nargs="+", metavar="PATH", help="files or tests in place of the whole suite and the quick one"
    )
    it.add_argument(
        "--families", action="store_true", help="beside the quick selection, the proof of every architecture"
    )
    it.add_argument("--jobs", type=int, default=2, metavar="N", help="versions that run side by side (%(default)s)")
    it.add_argument(
        "--root", type=Path, default=CHECKOUT / ".matrix", metavar="DIR", help="environments and logs (%(default)s)"
    )
    it.add_argument("--json", type=Path, metavar="FILE", help="write all numbers, failures and reasons to this file")
    it.add_argument(
        "--with",
        nargs="+",
        type=Path,
        default=[],
        dest="earlier",
        metavar="FILE",
        help="files of --json: what they say of versions that are not run now belongs to the result, too",
    )
    it.add_argument("--readme", action="store_true", help="put the table into README.md")
    return it


def version(text: str) -> str:
    """A version as it is written on PyPI; it need not be one of the table, so that a new one can be tried."""
    try:
        Version(text)
    except InvalidVersion as problem:
        raise argparse.ArgumentTypeError(str(problem)) from None
    return text


def earlier(files: Sequence[Path], but_not: Collection[str]) -> list[Record]:
    """The records in files of ours, without those of some versions; of two for one version, the later file's."""
    found = [Record(**record) for file in files for record in json.loads(file.read_text())]
    return [*{record.version: record for record in found if record.version not in but_not}.values()]


def runs(asked: argparse.Namespace) -> list[Run]:
    """One run for each version that is asked for; the whole suite where a version is named twice."""
    is_silent = not (asked.full or asked.quick is not None or asked.earlier)
    full = list(VERSIONS) if asked.all_full or is_silent else asked.full
    quick = [] if asked.quick is None else asked.quick or VERSIONS
    selection = "quick + families" if asked.families else "quick"
    suites = {**dict.fromkeys(quick, selection), **dict.fromkeys(full, "all")}
    root = asked.root.resolve()
    if asked.only:
        return [Run(name, "some", tuple(asked.only), root) for name in suites]
    return [Run(name, suite, SUITES[suite], root) for name, suite in suites.items()]


def tell(records: Sequence[Record]) -> None:
    """Print the table, what failed, and why tests were skipped."""
    for title, lines in (("", [table(records)]), ("Failed:", [*failures(records)]), ("Skipped:", [*reasons(records)])):
        if lines:
            print(title, *lines, "", sep="\n")


def keep(records: Sequence[Record], asked: argparse.Namespace) -> None:
    """Write the files that were asked for."""
    if asked.json:
        asked.json.write_text(json.dumps([asdict(record) for record in records], indent=1) + "\n")
    if asked.readme:
        readme = CHECKOUT / "README.md"
        readme.write_text(with_table(readme.read_text(), table(records)))


if __name__ == "__main__":
    sys.exit(main())
