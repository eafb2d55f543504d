"""Imports point down only (DESIGN.md, section 8), and no version is named outside compat/."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Each room may import itself and the rooms above it in this list (lower floors first). Where DESIGN.md names one room
# for several files, they are listed one by one; `binding` and `seam` lie below `cache` because a `SinkCache` takes its
# model at construction and must be bound, by adapters that the registry knows, before its first token. `compat` lies
# below them all: a `SinkCache` *is* a `Cache` of the installed transformers, so that class must be known first.
FLOORS = [
    ["errors"],
    ["compat", "transfer"],
    ["rotation", "arguments", "chat", "clock", "entries", "packing"],
    ["adapters", "layout", "padding", "seam"],
    ["family", "probe", "step"],
    ["built_in", "layers", "context"],
    ["hybrid", "sinks", "fixed"],
    ["registry"],
    ["binding"],
    ["streams", "fingerprint"],
    ["operations", "storage", "forwards"],
    ["keeping"],
    ["cache", "report", "verdicts"],
    ["request"],
    ["prefill", "drafts", "graph"],
    ["refusals"],
    ["generate"],
    ["autoload", "barrier"],
    ["activation"],
    ["__init__"],
    ["evaluate"],
    ["cli"],
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(path: Path) -> str:
    inside = path.relative_to(ROOT)
    if inside.parts[0] == "compat":
        return "compat"
    return inside.parts[1] if len(inside.parts) > 2 else inside.stem


def imported_rooms(path: Path) -> set[str]:
    """Rooms that a file imports anywhere, also inside functions; what stands under TYPE_CHECKING does not run."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    inner = {name.split(".")[1] for name in names if name.startswith("sink_patch.")}
    return {name for name in inner if name in FLOOR_OF} | ({"__init__"} if "sink_patch" in names else set())


FILES = sorted([*(ROOT / "sink_patch").rglob("*.py"), *(ROOT / "compat").rglob("*.py")])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    room = room_of(path)
    assert room in FLOOR_OF, f"{room} has no floor"
    above = {other for other in imported_rooms(path) if FLOOR_OF[other] > FLOOR_OF[room]}
    beside = {other for other in imported_rooms(path) if FLOOR_OF[other] == FLOOR_OF[room] and other != room}
    assert not above | beside


@pytest.mark.parametrize("name", ["__init__", "autoload"])
def test_what_torch_loads_imports_only_the_standard_library(name):
    tree = ast.parse((ROOT / "sink_patch" / f"{name}.py").read_text())
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    modules |= {str(node.module) for node in top if isinstance(node, ast.ImportFrom)}
    assert modules <= sys.stdlib_module_names


def test_no_version_is_named_outside_compat():
    pattern = re.compile(r"__version__\s*[<>=]=?\s*[\"'(]|is_transformers_version|version\.parse|Version\(")
    offenders = [path for path in (ROOT / "sink_patch").rglob("*.py") if pattern.search(path.read_text())]
    assert [path.name for path in offenders] == ["__init__.py"]  # its own version


def test_no_assert_speaks_to_users():
    for path in FILES:
        assert not [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)], path
