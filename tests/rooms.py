"""The rooms of the product, and the rules that hold them: `python -m tests.rooms` prints both.

A room is a folder. Imports between rooms point down only, and no circle of files is left; a room has at most nine
files, a file at most 200 lines, a function at most 40.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLOORS = (
    *("errors", "arguments", "compat", "rules", "history", "buffers", "models", "streaming", "cache", "kept"),
    *("generation", "batching", "doors", "patching", "__init__", "evaluate", "cli"),
)
"""From the ground up: a room may import itself and the rooms before it. `__init__` imports `autoload` by name."""
DATA = {"sink_patch/models/families/built_in.py": "a table of families, and the reasons of those that are refused"}
"""Files that may be longer, and why."""
MOST_FILES, MOST_LINES, MOST_LINES_OF_A_FUNCTION = 9, 200, 40


@dataclass(frozen=True)
class File:
    """One file of the product."""

    path: Path
    root: Path = ROOT

    @property
    def name(self) -> str:
        return self.path.relative_to(self.root).as_posix()

    @property
    def module(self) -> str:
        """Its installed name: compat/ is installed as sink_patch.compat."""
        parts = self.path.relative_to(self.root).with_suffix("").parts
        parts = parts if parts[0] == "sink_patch" else ("sink_patch", *parts)
        return ".".join(parts).removesuffix(".__init__")

    @property
    def room(self) -> str:
        """The folder below sink_patch, or the file itself where it stands at the top."""
        parts = self.module.split(".")
        return parts[1] if len(parts) > 1 else "__init__"

    @cached_property
    def source(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    @property
    def lines(self) -> int:
        return self.source.count("\n")

    def functions(self) -> Iterator[tuple[str, int]]:
        """(name, lines) of each function."""
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1

    def imports(self) -> set[str]:
        """Modules of ours that it imports anywhere, but for those under TYPE_CHECKING, which do not run."""
        skipped = {
            id(node)
            for block in ast.walk(self.tree)
            if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
            for statement in block.body
            for node in ast.walk(statement)
        }
        names: set[str] = set()
        for node in ast.walk(self.tree):
            if id(node) in skipped:
                continue
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
        return {name for name in names if name == "sink_patch" or name.startswith("sink_patch.")}


def files(root: Path = ROOT) -> list[File]:
    """All files of the product, in order."""
    found = [path for top in ("sink_patch", "compat") for path in (root / top).rglob("*.py")]
    return [File(path, root) for path in sorted(found) if not path.parent.is_symlink()]


def breaches(found: list[File]) -> Iterator[str]:
    """What is against the rules, a sentence each."""
    yield from _sizes(found)
    yield from _directions(found)
    for circle in circles({file.module: imported(file, found) for file in found}):
        yield f"a circle of imports: {' -> '.join(circle)}"
    for folder in {file.path.parent for file in found}:
        init = next((file for file in found if file.path == folder / "__init__.py"), None)
        if init is None or not ast.get_docstring(init.tree):
            yield f"{folder.name}/ has no __init__.py that says what it holds"


def _sizes(found: list[File]) -> Iterator[str]:
    for folder in sorted({file.path.parent for file in found}):
        count = sum(file.path.parent == folder for file in found)
        if count > MOST_FILES:
            yield f"{folder.name}/ has {count} files"
    for file in found:
        if file.lines > MOST_LINES and file.name not in DATA:
            yield f"{file.name} has {file.lines} lines"
        for name, lines in file.functions():
            if lines > MOST_LINES_OF_A_FUNCTION:
                yield f"{file.name}: {name} has {lines} lines"


def _directions(found: list[File]) -> Iterator[str]:
    for file in found:
        if file.room not in FLOORS:
            yield f"{file.name}: the room {file.room} has no floor"
            continue
        for module in imported(file, found):
            room = module.split(".")[1] if "." in module else "__init__"
            if FLOORS.index(room) > FLOORS.index(file.room):
                yield f"{file.name} imports {module}, from above"


def imported(file: File, found: list[File]) -> set[str]:
    """The modules among these files that it imports."""
    modules = {other.module for other in found}
    below = {name for name in file.imports() if name in modules} - {file.module}
    # `from sink_patch.x import y` names both; a package that is only on the way to one of its modules does not count
    return {name for name in below if not any(other.startswith(f"{name}.") for other in below)}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Circles in a graph of imports, each as a list that ends where it begins; one for each edge that closes one."""
    found, done = [], set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append([*path[path.index(module) :], module])
        elif module not in done:
            for other in sorted(graph.get(module, ())):
                visit(other, [*path, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])
    return found


def table(found: list[File]) -> str:
    """One line for each folder: files, its longest file and function, and the rooms that it imports."""
    lines = [f"{'room':28} files  longest file               longest function                  imports"]
    for folder in sorted({file.path.parent for file in found}):
        here = [file for file in found if file.path.parent == folder]
        file = max(here, key=lambda one: one.lines)
        name, length = max(
            (pair for one in here for pair in one.functions()), key=lambda pair: pair[1], default=("", 0)
        )
        rooms = {module.split(".")[1] for one in here for module in imported(one, found) if "." in module}
        rooms -= {one.room for one in here}
        longest = f"{file.path.name} {file.lines}"
        lines.append(
            f"{folder.relative_to(here[0].root).as_posix():28} {len(here):5}  {longest:25}  {f'{name} {length}':32}  "
            f"{' '.join(sorted(rooms, key=FLOORS.index))}"
        )
    return "\n".join(lines)


def main() -> int:
    """Print the rooms, and what is against the rules."""
    found = files()
    print(table(found))
    against = list(breaches(found))
    print("", *against, f"{len(against)} against the rules", sep="\n")
    return 1 if against else 0


if __name__ == "__main__":
    sys.exit(main())
