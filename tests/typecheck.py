"""mypy over the package as it is installed, `compat/` in its place as `sink_patch.compat`: `python -m tests.typecheck`.

In the checkout mypy would find nothing under that name, and take all that comes from it for `Any`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
_NO_CACHES = shutil.ignore_patterns("__pycache__", "compat")


def lay_out(target: Path, root: Path = ROOT) -> None:
    """Copy the package to `target` as setuptools installs it (pyproject.toml, `package-dir`)."""
    shutil.copytree(root / "sink_patch", target / "sink_patch", ignore=_NO_CACHES)
    shutil.copytree(root / "compat", target / "sink_patch" / "compat", ignore=_NO_CACHES)


def main() -> int:
    """Run mypy; returns its exit status."""
    with tempfile.TemporaryDirectory() as folder:
        lay_out(Path(folder))
        command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "-p", "sink_patch"]
        cache = ["--cache-dir", str(ROOT / ".mypy_cache")]
        return subprocess.run([*command, *cache, *sys.argv[1:]], cwd=folder, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
