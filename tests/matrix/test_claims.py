"""What pyproject.toml claims of torch and Python was tested: in CI, or by hand with the result in compat/README.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from setuptools.config.pyprojecttoml import read_configuration

from tests.matrix.records import minor
from tests.matrix.versions import LEAST, OTHERS, PYTHON, TORCH, VERSIONS

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def project():
    return read_configuration(ROOT / "pyproject.toml", expand=False)["project"]


@pytest.fixture(scope="module")
def least(project):
    """The least version of each package that we depend on."""
    needed = map(Requirement, project["dependencies"])
    return {one.name: re.fullmatch(r">=([\d.]+)", str(one.specifier)).group(1) for one in needed}


def test_each_python_of_the_classifiers_was_tested_and_the_oldest_is_the_least(project):
    tested = sorted({PYTHON, *(one.python for one in OTHERS)}, key=Version)
    claimed = [line.rpartition(" ")[2] for line in project["classifiers"] if re.search(r":: 3\.\d+$", line)]
    assert claimed == tested
    assert SpecifierSet(project["requires-python"]) == SpecifierSet(f">={tested[0]}")


def test_the_least_torch_and_the_least_transformers_were_tested(least):
    tested = [TORCH, *(minor(one.torch) for one in OTHERS)]
    assert least["torch"] == min(tested, key=Version)
    assert least["transformers"] == minor(VERSIONS[0])


def test_the_other_packages_are_tested_as_old_as_they_may_be(least):
    assert {name: version for name, version in least.items() if name not in ("torch", "transformers")} == LEAST


def test_the_table_has_each_combination_without_a_failure():
    text = (ROOT / "compat" / "README.md").read_text()
    table = text.partition("<!-- torch -->")[2].partition("<!-- /torch -->")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    wanted = [[one.torch, one.python, version] for one in OTHERS for version in one.transformers]
    assert sorted(row[:3] for row in rows) == sorted(wanted)
    assert all(int(passed.replace(",", "")) > 100 and failed == "0" for *_, passed, failed, _ in rows)
