"""The table of known gaps: each row has a reason, applies to a version of the matrix, and matches existing tests."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from tests.matrix.versions import OTHERS, TORCH, VERSIONS
from tests.support import known_gaps
from tests.support.known_gaps import KnownGap

ROOT = Path(__file__).parent.parent.parent
TORCHES = (TORCH, *(one.torch for one in OTHERS))
OLD, NEW = Version("4.52.4"), Version("5.0.0")


def test_each_row_has_a_reason_and_applies_to_a_version_of_the_matrix():
    for gap in known_gaps.KNOWN_GAPS:
        assert gap.reason.strip(), gap
        assert any(gap.applies_to(Version(version), Version(torch)) for version in VERSIONS for torch in TORCHES), gap


def test_each_file_of_the_table_exists():
    for gap in known_gaps.KNOWN_GAPS:
        if gap.is_file:
            assert [*ROOT.glob(gap.tests)], gap


def test_each_row_for_this_version_matches_an_existing_test(collected):
    for gap in known_gaps.gaps_of():
        assert gap.is_file or any(map(gap.matches, collected)), gap


@pytest.fixture
def table(monkeypatch):
    rows = (
        KnownGap(SpecifierSet("<5"), "tests/test_a.py::test_b*", "no brackets"),
        KnownGap(SpecifierSet("<5"), "tests/test_a.py::test_c[x-*]", "no x"),
        KnownGap(SpecifierSet(">=5"), "tests/test_d.py", "no d"),
        KnownGap(SpecifierSet("<5"), "tests/test_f.py::*", "no f", torch=SpecifierSet("<2")),
        KnownGap(SpecifierSet("<5"), "tests/test_g.py::*", "no g", torch=SpecifierSet(">=2")),
    )
    monkeypatch.setattr(known_gaps, "KNOWN_GAPS", rows)


@pytest.mark.parametrize(
    ("nodeid", "version", "reason"),
    [
        ("tests/test_a.py::test_c[x-1]", OLD, "no x"),
        ("tests/test_a.py::test_c[x-1]", NEW, None),
        ("tests/test_a.py::test_c[y-1]", OLD, None),
        ("tests/test_a.py::test_cx", OLD, None),
        ("tests/test_d.py", NEW, "no d"),
        ("tests/test_d.py", OLD, None),
        ("tests/test_d.py::test_e", NEW, None),
        ("tests/test_f.py::test_a", OLD, None),
        ("tests/test_g.py::test_a", OLD, "no g"),
        ("tests/test_g.py::test_a", NEW, None),
    ],
)
def test_brackets_are_literal_and_stars_are_wildcards(nodeid, version, reason, table):
    assert known_gaps.reason_to_skip(nodeid, version) == reason


SUITE = {
    "conftest": """
        import pytest
        from packaging.specifiers import SpecifierSet
        from tests.support import known_gaps

        known_gaps.KNOWN_GAPS = (
            known_gaps.KnownGap(SpecifierSet(">=4"), "test_whole.py", "no module of that name"),
            known_gaps.KnownGap(SpecifierSet(">=4"), "test_parts.py::test_missing*", "no such part"),
        )
        from tests.conftest import pytest_collection_modifyitems, pytest_pycollect_makemodule
    """,
    "test_whole": "import a_module_that_is_not_there",
    "test_parts": "def test_missing(): raise SystemError\ndef test_present(): pass",
}


def test_files_and_tests_of_the_table_are_skipped_with_their_reason(tmp_path):
    for name, text in SUITE.items():
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-ra", "-p", "no:cacheprovider"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "1 passed, 2 skipped" in done.stdout
    assert "no module of that name" in done.stdout
    assert "no such part" in done.stdout
