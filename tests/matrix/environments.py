"""A virtual environment for each version of transformers; torch and the tools are those of the python that runs this.

An environment contains only the packages that differ between versions (transformers, tokenizers, huggingface-hub). So
all of them together take a few minutes and a few GB, without a second torch.
"""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import IO

from packaging.version import Version

from tests.matrix.records import minor
from tests.matrix.versions import BESIDE, PYTHON, TORCH

HERE = (Version(importlib.metadata.version("torch")).public, minor(platform.python_version()))
"""The torch and the Python of all environments that this python makes, without the torch's build ("+cpu")."""
SHARED = Path(sysconfig.get_path("purelib"))
SHARE = f"import site; site.addsitedir({str(SHARED)!r})\n"
ASK = "import importlib.metadata, torch, transformers; print(importlib.metadata.version('transformers'))"


def root_in(folder: Path) -> Path:
    """Where the environments of this torch and this Python lie: those of others are not theirs."""
    torch, python = HERE
    return folder if (minor(torch), python) == (TORCH, PYTHON) else folder / f"torch-{torch}-python-{python}"


def python_of(folder: Path) -> Path:
    """The python of an environment."""
    return folder / "bin" / "python"


def packages_of(folder: Path) -> Path:
    """The folder of an environment's own packages."""
    return Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))


def environment(version: str, root: Path, log: IO[str]) -> Path:
    """The folder of the environment of one version, which is created unless it exists and works.

    Raises:
        subprocess.CalledProcessError: it cannot be created; the log says why.
    """
    folder = root / version
    if not is_ready(folder, version):
        call("-m", "venv", "--without-pip", "--clear", str(folder), log=log)
        share(folder)
        pip = ("-m", "pip", "--python", str(python_of(folder)), "--disable-pip-version-check")
        wanted = (f"transformers=={version}", *BESIDE.get(version, ()))
        call(*pip, "install", "--quiet", "--no-compile", *wanted, log=log)
    return folder


def is_ready(folder: Path, version: str) -> bool:
    """Whether an environment exists that can import this version together with torch."""
    if not packages_of(folder).is_dir():
        return False
    share(folder)
    asked = [str(python_of(folder)), "-c", ASK]
    done = subprocess.run(asked, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    return done.returncode == 0 and done.stdout.split()[-1:] == [version]


def share(folder: Path) -> None:
    """Add the packages of this python to an environment, after its own."""
    (packages_of(folder) / "_shared.pth").write_text(SHARE)


def call(*arguments: str, log: IO[str]) -> None:
    """Run this python with arguments; its output goes to the log."""
    command = [sys.executable, *arguments]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
