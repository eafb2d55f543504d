"""What would be published: an sdist, its wheel, and that wheel in a fresh environment."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

import sink_patch
from tests.support import directory
from tests.support.fresh import environment
from tests.support.known_gaps import is_newest
from tests.test_rooms import FOUND

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not is_newest(), reason="the package is the same with all versions of transformers")

BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
"""What `python -m build --no-isolation` and `pip wheel --no-build-isolation` call."""


def built(kind: str, source: Path, target: Path) -> Path:
    """The one file that setuptools builds from a source tree."""
    target.mkdir()
    call(sys.executable, "-c", BUILD, kind, str(target), cwd=source)
    (file,) = target.iterdir()
    return file


def call(*command: str, cwd: Path, **extra: str) -> str:
    """What a command prints; if it fails, the test fails with that."""
    kept = {name: value for name, value in environment(**extra).items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=kept, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def left_out(folder: str, names: list[str]) -> set[str]:
    """What is no part of a fresh checkout; a link to compat/ may lie in sink_patch/."""
    return {name for name in names if name == "__pycache__" or Path(folder, name).is_symlink()}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the checkout, as building writes into it."""
    folder = tmp_path_factory.mktemp("checkout")
    for file in ROOT.iterdir():
        if file.is_file() and not file.name.startswith("."):
            shutil.copy(file, folder)
    for name in ("sink_patch", "compat", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=left_out)
    return folder


@pytest.fixture(scope="module")
def sdist(checkout, tmp_path_factory) -> Path:
    return built("build_sdist", checkout, tmp_path_factory.mktemp("sdist") / "dist")


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """Built from the sdist, as pip does."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return built("build_wheel", source, folder / "dist")


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_sdist_gives_the_wheel_of_the_checkout(checkout, wheel, tmp_path):
    assert contents(built("build_wheel", checkout, tmp_path / "dist")) == contents(wheel)


DATA = ("sink_patch/py.typed", "sink_patch/evaluate/demo/text.txt")


def test_the_wheel_holds_the_code_and_nothing_else(wheel):
    code = {f"{file.name}" if file.room != "compat" else f"sink_patch/{file.name}" for file in FOUND}
    info = f"sink_patch-{sink_patch.__version__}.dist-info/"
    assert {name for name in contents(wheel) if not name.startswith(info)} == {*code, *DATA}


def test_the_sdist_holds_what_the_readme_links_to(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    links = re.findall(r"\]\(([^):]+)\)", (ROOT / "README.md").read_text())
    assert len(links) > 8
    assert set(links) <= names
    assert "pyproject.toml" in names
    assert not [name for name in names if "__pycache__" in name]


def test_its_version_stands_in_one_place(wheel):
    found = contents(wheel)[f"sink_patch-{sink_patch.__version__}.dist-info/METADATA"].decode()
    metadata = HeaderParser().parsestr(found)
    assert metadata["Version"] == sink_patch.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert all(metadata[name] for name in ("Classifier", "Keywords", "Author"))
    assert sink_patch.__version__ not in (ROOT / "pyproject.toml").read_text()
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M).group(1) == sink_patch.__version__


@pytest.fixture(scope="module")
def programs(wheel, tmp_path_factory) -> Path:
    """The programs of a fresh environment with the wheel in it, and beside it the packages of this one.

    Their folders are on its path as they are, so that no .pth file in them is read: an editable install of ours, which
    is one, does not exist there.
    """
    folder = tmp_path_factory.mktemp("environment")
    call(sys.executable, "-m", "venv", "--without-pip", str(folder), cwd=folder)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    shared = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (own / "shared.pth").write_text("\n".join(shared))
    programs = Path(sysconfig.get_path("scripts", vars={"base": str(folder)}))
    pip = (sys.executable, "-m", "pip", "--python", str(programs / "python"), "--disable-pip-version-check")
    call(*pip, "install", "--quiet", "--no-deps", "--no-index", "--no-compile", str(wheel), cwd=folder)
    return programs


STREAM = """
import sys
import torch
assert "sink_patch" in sys.modules, "torch has not loaded it"
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, max_position_embeddings=64, eos_token_id=None))
asked = dict(cache_implementation="sink", window_length=12, num_sink_tokens=3, max_new_tokens=100, do_sample=False)
made = model.generate(torch.tensor([[5, 6, 7]]), **asked, return_dict_in_generate=True)
assert made.past_key_values.window_length == 12 and made.sequences.shape == (1, 103)
import sink_patch
print(sink_patch.__file__)
assert all(hasattr(sink_patch, name) for name in sink_patch.__all__)
from sink_patch.cli import main
sys.exit(main(sys.argv[1:]))
"""
"""A stream with no import of ours, and then, in the same process as torch takes long to come, a command."""


def test_it_streams_with_no_import_of_ours_and_the_demo_runs_on_a_model_directory(programs, tmp_path):
    folder = directory.write(tmp_path / "tiny")
    asked = ["--window-length", "12", "--num-sink-tokens", "3", "--max-new-tokens", "30", "--prompt", "w5 w6 w7"]
    printed = call(str(programs / "python"), "-c", STREAM, "demo", str(folder), *asked, cwd=tmp_path)
    assert printed.startswith(f"{programs.parent}{os.sep}")
    assert "tiny" in printed
    assert "12" in printed


def test_its_command_alone_prints_help(programs, tmp_path):
    printed = call(str(programs / "sink-patch"), cwd=tmp_path)
    assert printed.startswith("usage: sink-patch ")
    assert "generate a story" in printed
    assert call(str(programs / "sink-patch"), "--version", cwd=tmp_path) == f"sink-patch {sink_patch.__version__}\n"
