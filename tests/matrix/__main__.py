"""Run the tests on each version of transformers; the exit code is 1 if any failed, or if a version ran none.

    python -m tests.matrix                                  all versions, the whole suite
    python -m tests.matrix --full 4.52.4 5.3.0 --quick      two versions in full, a quick selection on all others
    python -m tests.matrix --quick --without 5.24.0         a quick selection on all versions but one
    python -m tests.matrix --quick 5.0.0 --families         a quick selection and the proof of every architecture
    python -m tests.matrix --quick 5.4.0 --only tests/cache/test_cache.py
    python -m tests.matrix --full 5.4.0 --with old.json --readme    one version again, and the table of all

Torch and the tools are those of the python that runs this: another torch is tested by running it with another python,
and has a table of its own. compat/README.md says how.

    OTHER/bin/python -m tests.matrix --torch 5.24.0 --json other.json    a quick selection, and what rests on torch
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path

from packaging.version import InvalidVersion, Version

from tests.matrix.environments import root_in
from tests.matrix.records import Key, Record
from tests.matrix.report import closing_line, failures, line, reasons, tables, with_tables
from tests.matrix.runs import CHECKOUT, SUITES, Run, all_of
from tests.matrix.versions import VERSIONS


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    asked = parser().parse_args(arguments)
    records = []
    for record in all_of(runs(asked), asked.jobs):
        print(line(record), flush=True)
        records.append(record)
    records += earlier(asked.earlier, but_not={record.key for record in records})
    records.sort(key=lambda record: record.key)
    print_results(records)
    write_files(records, asked)
    print(closing_line(records))
    return 0 if records and all(record.is_good for record in records) else 1


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    it = argparse.ArgumentParser(
        prog="python -m tests.matrix", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    it.add_argument(
        "--full", nargs="+", type=version, default=[], metavar="V", help="the whole suite on these versions"
    )
    it.add_argument("--all-full", action="store_true", help="the whole suite on all versions (the default)")
    it.add_argument(
        "--quick",
        nargs="*",
        type=version,
        metavar="V",
        help="a quick selection on these; without V, on all others",
    )
    it.add_argument(
        "--torch",
        nargs="+",
        type=version,
        default=[],
        metavar="V",
        help="the quick selection and what rests on torch on these: for a python with another torch",
    )
    it.add_argument(
        "--without", nargs="+", type=version, default=[], metavar="V", help="leave these out: they are tested elsewhere"
    )
    it.add_argument(
        "--only",
        nargs="+",
        metavar="PATH",
        help="these files or tests instead of the whole suite and of the quick selection",
    )
    it.add_argument(
        "--families", action="store_true", help="add the tests of every architecture to the quick selection"
    )
    it.add_argument(
        "--jobs", type=int, default=2, metavar="N", help="how many versions run at the same time (%(default)s)"
    )
    it.add_argument(
        "--root",
        type=Path,
        default=root_in(CHECKOUT / ".matrix"),
        metavar="DIR",
        help="environments and logs (%(default)s)",
    )
    it.add_argument("--json", type=Path, metavar="FILE", help="write all numbers, failures and reasons to this file")
    it.add_argument(
        "--with",
        nargs="+",
        type=Path,
        default=[],
        dest="earlier",
        metavar="FILE",
        help="files of --json: their records of versions that are not run now are added to the result",
    )
    it.add_argument("--readme", action="store_true", help="put the tables into compat/README.md")
    return it


def version(text: str) -> str:
    """A version as on PyPI; versions outside the table are allowed, so that a new one can be tried."""
    try:
        Version(text)
    except InvalidVersion as problem:
        raise argparse.ArgumentTypeError(str(problem)) from None
    return text


def earlier(files: Sequence[Path], but_not: Collection[Key]) -> list[Record]:
    """The records in files of --json, without some keys; of two for one key, that of the later file."""
    found = [Record(**record) for file in files for record in json.loads(file.read_text())]
    return [*{record.key: record for record in found if record.key not in but_not}.values()]


def runs(asked: argparse.Namespace) -> list[Run]:
    """One run for each version that is asked for; the whole suite if a version is named twice."""
    is_default = not (asked.full or asked.quick is not None or asked.torch or asked.earlier)
    full = list(VERSIONS) if asked.all_full or is_default else asked.full
    quick = [] if asked.quick is None else asked.quick or VERSIONS
    selection = "quick + families" if asked.families else "quick"
    suites = {**dict.fromkeys(quick, selection), **dict.fromkeys(asked.torch, "torch"), **dict.fromkeys(full, "all")}
    suites = {name: suite for name, suite in suites.items() if name not in asked.without}
    root = asked.root.resolve()
    if asked.only:
        return [Run(name, "some", tuple(asked.only), root) for name in suites]
    return [Run(name, suite, SUITES[suite], root) for name, suite in suites.items()]


def print_results(records: Sequence[Record]) -> None:
    """Print the tables, the failures, and why tests were skipped."""
    made = [*tables(records).values()]
    for title, lines in (
        ("", made[:1]),
        ("", made[1:]),
        ("Failed:", [*failures(records)]),
        ("Skipped:", [*reasons(records)]),
    ):
        if lines:
            print(title, *lines, "", sep="\n")


def write_files(records: Sequence[Record], asked: argparse.Namespace) -> None:
    """Write the files of --json and --readme."""
    if asked.json:
        asked.json.write_text(json.dumps([asdict(record) for record in records], indent=1) + "\n")
    if asked.readme:
        readme = CHECKOUT / "compat" / "README.md"
        readme.write_text(with_tables(readme.read_text(), tables(records)))


if __name__ == "__main__":
    sys.exit(main())
