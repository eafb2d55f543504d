"""The table of what versions lack: each row has a reason, is needed, and names tests that are there."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from tests.matrix.versions import VERSIONS
from tests.support import known_gaps as lacks
from tests.support.known_gaps import Lack

ROOT = Path(__file__).parent.parent.parent
OLD, NEW = Version("4.52.4"), Version("5.0.0")


def test_each_row_has_a_reason_and_a_version_of_the_matrix():
    for lack in lacks.LACKS:
        assert lack.reason.strip(), lack
        assert any(lack.holds(Version(version)) for version in VERSIONS), lack


def test_each_file_of_the_table_is_there():
    for lack in lacks.LACKS:
        if lack.is_file:
            assert [*ROOT.glob(lack.tests)], lack


def test_each_row_for_this_version_names_a_test_that_is_there(collected):
    for lack in lacks.here():
        assert lack.is_file or any(map(lack.names, collected)), lack


@pytest.fixture
def table(monkeypatch):
    rows = (
        Lack(SpecifierSet("<5"), "tests/test_a.py::test_b*", "no brackets"),
        Lack(SpecifierSet("<5"), "tests/test_a.py::test_c[x-*]", "no x"),
        Lack(SpecifierSet(">=5"), "tests/test_d.py", "no d"),
    )
    monkeypatch.setattr(lacks, "LACKS", rows)


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
    ],
)
def test_brackets_are_meant_as_they_are_and_stars_stand_for_anything(nodeid, version, reason, table):
    assert lacks.of(nodeid, version) == reason


SUITE = {
    "conftest": """
        import pytest
        from packaging.specifiers import SpecifierSet
        from tests.support import known_gaps as lacks

        lacks.LACKS = (
            lacks.Lack(SpecifierSet(">=4"), "test_whole.py", "no module of that name"),
            lacks.Lack(SpecifierSet(">=4"), "test_parts.py::test_lacking*", "no such part"),
        )
        from tests.conftest import pytest_collection_modifyitems, pytest_pycollect_makemodule
    """,
    "test_whole": "import a_module_that_is_not_there",
    "test_parts": "def test_lacking(): raise SystemError\ndef test_there(): pass",
}


def test_lacking_files_and_tests_are_skipped_with_their_reason(tmp_path):
    for name, text in SUITE.items():
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-ra", "-p", "no:cacheprovider"]
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=surroundings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "1 passed, 2 skipped" in done.stdout
    assert "no module of that name" in done.stdout
    assert "no such part" in done.stdout
