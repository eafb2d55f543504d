"""The results of one run of pytest, read from its junit file and its log."""

from __future__ import annotations

import ast
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from packaging.version import Version

from tests.matrix.versions import PYTHON, TORCH

ARCHITECTURES = re.compile(r"^\d+ architectures: (\d+) exact, (\d+) refused", re.MULTILINE)  # see tests/conftest.py
BAD = ("failure", "error")
NO_IMPORT = "collection failure"
NO_FILE = "collection skipped"
"""The messages of pytest for a file that cannot be imported, and for one that is skipped as a whole."""
NO_ENVIRONMENT, TOO_LONG = -1001, -1002
"""Instead of pytest's exit code, if pytest did not start or did not end."""
Key = tuple[Version, Version, str]
"""transformers, torch, Python."""


@dataclass(frozen=True)
class Record:
    """The tests of one version of transformers.

    Args:
        version: of transformers.
        suite: a name of SUITES in runs.py, or "some".
        exit_code: pytest's; negative if it was killed, or one of the two above.
        seconds: from pytest's start to its end.
        passed, failed, errors, skipped: tests. One that passes and then fails to clean up is an error; one that fails
            and then fails to clean up is both.
        exact, refused: architectures; None if they were not tested.
        bad: the tests that failed, each with its message.
        reasons: why tests were skipped, and how many for each reason.
        torch, python: beside which it ran, such as "2.13.0" and "3.11"; "": those of CI.
    """

    version: str
    suite: str
    exit_code: int
    seconds: float = 0.0
    passed: int = 0
    failed: int = 0
    errors: int = 0
    skipped: int = 0
    exact: int | None = None
    refused: int | None = None
    bad: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    torch: str = ""
    python: str = ""

    @property
    def is_beside_others(self) -> bool:
        """Whether it ran with another torch or Python than CI."""
        return bool(self.torch) and (minor(self.torch), self.python) != (TORCH, PYTHON)

    @property
    def key(self) -> Key:
        """What it is about: of two records with one key, one is right."""
        torch, python = (self.torch, self.python) if self.is_beside_others else (TORCH, PYTHON)
        return Version(self.version), Version(torch), python

    @property
    def is_good(self) -> bool:
        """Tests ran, and none failed."""
        return self.exit_code == 0 and self.passed > 0 and not self.failed and not self.errors


def read(version: str, suite: str, exit_code: int, seconds: float, junit: Path, log: Path) -> Record:
    """The record of a run; one without tests if pytest died before it wrote its file."""
    if not junit.is_file():
        return Record(version, suite, exit_code, seconds)
    seen: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    bad: dict[str, str] = {}
    for case in ElementTree.parse(junit).iter("testcase"):
        marks = [mark for mark in case if mark.tag in (*BAD, "skipped")]
        seen.update([mark.tag for mark in marks] or ["passed"])
        for mark in marks:
            if mark.tag in BAD:
                bad.setdefault(name_of(case), complaint(mark))
            else:
                reasons[reason(mark)] += 1
    exact, refused = architectures(log.read_text(errors="replace"))
    return Record(
        *(version, suite, exit_code, seconds),
        *(seen["passed"], seen["failure"], seen["error"], seen["skipped"]),
        *(exact, refused, bad, dict(reasons.most_common())),
    )


def name_of(case: ElementTree.Element) -> str:
    """A test's node id; a file's path if the whole file failed."""
    file, name = case.get("file", ""), case.get("name", "")
    return f"{file}::{name}" if case.get("classname") else file or name


def complaint(mark: ElementTree.Element) -> str:
    """A failure in one line: the first of its message, or the last of the traceback of an import."""
    message = mark.get("message", "")
    lines = (mark.text or "").splitlines()[-1:] if message == NO_IMPORT else message.splitlines()
    return lines[0].strip() if lines else message


def reason(mark: ElementTree.Element) -> str:
    """Why a test was skipped. For a whole file the reason is in the text, as (path, line, reason)."""
    message = mark.get("message", "")
    if message != NO_FILE:
        return message
    *_, found = ast.literal_eval(mark.text or "")
    return str(found).removeprefix("Skipped: ")


def architectures(log: str) -> tuple[int | None, int | None]:
    """How many architectures are exact and how many are refused, from the line of conftest.py in the log."""
    found = ARCHITECTURES.findall(log)
    return (int(found[-1][0]), int(found[-1][1])) if found else (None, None)


def minor(version: str) -> str:
    """The first two numbers of a version."""
    return ".".join(map(str, Version(version).release[:2]))
