"""The rooms hold their rules, and each rule can be broken (tests/rooms.py, which prints them)."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
from setuptools.config.pyprojecttoml import read_configuration

from tests import rooms

ROOT = rooms.ROOT
FOUND = rooms.files()
IDS = [file.name for file in FOUND]


def test_nothing_is_against_the_rules():
    assert list(rooms.breaches(FOUND)) == []


def test_main_prints_a_line_for_each_room(capsys):
    assert rooms.main() == 0
    printed = capsys.readouterr().out
    for folder in {file.path.parent for file in FOUND}:
        assert f"\n{folder.relative_to(ROOT).as_posix()} " in printed
    assert printed.endswith("\n0 against the rules\n")


def made_up(folder: Path, files: dict[str, str]) -> list[rooms.File]:
    """A product in a folder, each of whose packages says what it holds."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for path in [folder / "sink_patch", *(folder / "sink_patch").rglob("*"), folder / "compat"]:
        if path.is_dir() and not (path / "__init__.py").exists():
            (path / "__init__.py").write_text('"""What it holds."""\n')
    (folder / "compat").mkdir(exist_ok=True)
    return rooms.files(folder)


LONG_FUNCTION = "def long():\n" + "    call()\n" * 41
BROKEN = {
    "ten files": ({f"sink_patch/rules/a{number}.py": "" for number in range(9)}, "rules/ has 10 files"),
    "201 lines": ({"sink_patch/rules/a.py": "x = 1\n" * 201}, "a.py has 201 lines"),
    "a long function": ({"sink_patch/rules/a.py": LONG_FUNCTION}, "a.py: long has 42 lines"),
    "an import from above": (
        {"sink_patch/rules/a.py": "from sink_patch.buffers import b\n", "sink_patch/buffers/b.py": ""},
        "rules/a.py imports sink_patch.buffers.b, from above",
    ),
    "an import from above inside a function": (
        {"compat/a.py": "def f():\n    import sink_patch.rules.b\n", "sink_patch/rules/b.py": ""},
        "compat/a.py imports sink_patch.rules.b, from above",
    ),
    "a circle in a room": (
        {
            "sink_patch/rules/a.py": "from sink_patch.rules.b import x\n",
            "sink_patch/rules/b.py": "from sink_patch.rules import a\n",
        },
        "a circle of imports: sink_patch.rules.a -> sink_patch.rules.b -> sink_patch.rules.a",
    ),
    "a room that is not known": ({"sink_patch/attic/a.py": ""}, "attic has no floor"),
    "a room that does not say what it holds": (
        {"sink_patch/rules/__init__.py": "", "sink_patch/rules/a.py": ""},
        "rules/ has no __init__.py that says what it holds",
    ),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_each_rule_can_be_broken(rule, tmp_path):
    files, said = BROKEN[rule]
    assert any(said in one for one in rooms.breaches(made_up(tmp_path, files)))


def test_what_keeps_the_rules_has_no_breaches(tmp_path):
    files = {
        "sink_patch/rules/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import sink_patch.cli\n",
        "sink_patch/cli.py": "from sink_patch.rules import a\n",
    }
    assert list(rooms.breaches(made_up(tmp_path, files))) == []


def test_all_rooms_are_installed():
    """A folder that pyproject.toml does not list would be missing in a wheel."""
    tools = read_configuration(ROOT / "pyproject.toml", expand=False)["tool"]["setuptools"]
    folders = {file.path.parent.relative_to(ROOT).as_posix() for file in FOUND}
    assert sorted(tools["packages"]) == sorted(
        "sink_patch.compat" if folder == "compat" else folder.replace("/", ".") for folder in folders
    )


OURS = {"sink_patch.patching.state"}  # which holds the rule itself


@pytest.mark.parametrize("name", ["__init__", "patching/__init__", "patching/autoload", "patching/state"])
def test_what_torch_loads_imports_only_the_standard_library(name):
    tree = ast.parse((ROOT / "sink_patch" / f"{name}.py").read_text())
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    modules |= {str(node.module) for node in top if isinstance(node, ast.ImportFrom)}
    assert modules - OURS <= sys.stdlib_module_names


PUBLIC = {"sink_patch", "sink_patch.errors", "sink_patch.arguments", "sink_patch.cli"}


@pytest.mark.parametrize("file", FOUND, ids=IDS)
def test_what_the_command_line_does_stands_on_public_names_alone(file):
    if file.room not in ("evaluate", "cli"):
        pytest.skip("another room")
    named = {name for name in file.imports() if not name.startswith("sink_patch.evaluate")}
    assert {name for name in named if not any(name == one or name.startswith(f"{one}.") for one in PUBLIC)} == set()


VERSION = re.compile(r"\b4\.5\d\b|\b5\.\d{1,2}\b|\b[45]\.x\b|__version__\s*(==|!=|[<>]=?)|is_\w+_version|\bVersion\(")
"""A version of transformers (4.52, 5.x), said or compared."""
MAY_NAME_VERSIONS = {
    "sink_patch/models/families/built_in.py": "where in transformers' files a family was read, and reasons for users",
}


def names_versions(source: str) -> list[str]:
    return [line.strip() for line in source.splitlines() if VERSION.search(line)]


@pytest.mark.parametrize(
    "line", ["# in 4.x the buffer", "up to 5.14 it", 'if version.__version__ >= "5"', "Version(a)"]
)
def test_what_names_a_version_is_found(line):
    assert names_versions(line)


@pytest.mark.parametrize("line", ["arXiv 2309.17453, section 4.1", "x = 0.1 + 14.5", '__version__ = "0.1.0"'])
def test_what_names_none_is_not_found(line):
    assert not names_versions(line)


@pytest.mark.parametrize("file", FOUND, ids=IDS)
def test_no_version_of_transformers_is_known_outside_compat(file):
    """Neither in code nor in comments, which tell of a branch that belongs into compat/."""
    if file.room == "compat" or file.name in MAY_NAME_VERSIONS:
        pytest.skip("versions belong here")
    assert names_versions(file.source) == []


@pytest.mark.parametrize("file", FOUND, ids=IDS)
def test_no_assert_speaks_to_users(file):
    assert not [node for node in ast.walk(file.tree) if isinstance(node, ast.Assert)]


@pytest.mark.parametrize("file", FOUND, ids=IDS)
def test_imports_are_absolute(file):
    assert not [node for node in ast.walk(file.tree) if isinstance(node, ast.ImportFrom) and node.level]
