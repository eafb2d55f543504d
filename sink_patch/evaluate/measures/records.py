"""Records of measures: JSON files with the figures and all that is needed to measure them again.

No path of this machine goes into a record: models and texts are named by their last part, and texts by their sha256.
Reading and writing need no torch, so that old records are drawn at once.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from sink_patch.errors import SinkArgumentError

if TYPE_CHECKING:
    from sink_patch.evaluate.models import Loaded

Record: TypeAlias = "dict[str, Any]"
_NUMBERS = re.compile(r"\[\n\s*([^\[\]{}\"]*?)\s*\]")  # a list of them, which json writes one a line

_WRITTEN_BY = {"streameval": ("streameval", "questions")}  # of a command that writes several measures


def about(loaded: Loaded) -> Record:
    """The model and what it was measured with: name, kind, weights (a digest), precision, threads, versions."""
    import torch

    model = loaded.model
    return {
        "model": loaded.name,
        "model_type": model.config.model_type,
        "weights": _fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of all that figures depend on."""
    import torch
    import transformers

    import sink_patch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sink_patch": sink_patch.__version__,
    }


def _fingerprint(model: Any) -> str:
    """A digest of the first numbers of each parameter, by which trained models differ."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if parameter.device.type != "meta":  # which holds no numbers
            digest.update(parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def read_text(path: Path) -> str:
    """A text in UTF-8.

    Raises:
        SinkArgumentError: it cannot be read, or is none, or is empty.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as failure:
        raise SinkArgumentError(f"The text {path} cannot be read: {failure}. Give a UTF-8 file.") from failure
    if not text:
        raise SinkArgumentError(f"The text {path} is empty. Give a UTF-8 file with a text in it.")
    return text


def about_text(path: Path, text: str) -> Record:
    """The name of a text's file, and the sha256 of the text."""
    return {"name": path.name, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def check_writable(path: Path | None) -> None:
    """Before the long work, not after it.

    Raises:
        SinkArgumentError: no file can be written there.
    """
    if path is not None and not path.parent.is_dir():
        raise SinkArgumentError(f"There is no directory {path.parent} for {path.name}. Make it first.")
    if path is not None and path.is_dir():
        raise SinkArgumentError(f"{path} is a directory. Give the path of a file.")


def check_own(path: Path | None, command: str) -> None:
    """What a measure has written may be written again, and no other file. Also before the long work.

    Args:
        path: where the record is to go; None: nowhere.
        command: of `sink-patch eval`.

    Raises:
        SinkArgumentError: another file is there.
    """
    if path is None or not path.exists():
        return
    try:
        is_own = path.is_file() and read(path)["measure"] in _WRITTEN_BY.get(command, (command,))
    except SinkArgumentError:
        is_own = False
    if not is_own:
        raise SinkArgumentError(
            f"{path} is there already and was not written by `sink-patch eval {command}`. Give another name, or delete "
            "it."
        )


def write(path: Path, record: Record) -> None:
    """Write a record. Whoever reads at the same time, or after a crash, finds the old one or the new one whole."""
    text = _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", json.dumps(record, indent=1))
    partial = path.with_name(f"{path.name}.part")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


def read(path: Path) -> Record:
    """A record that `write` has written.

    Raises:
        SinkArgumentError: there is none, or it is something else.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as failure:
        raise SinkArgumentError(f"{path} cannot be read: {failure}. Give a file of sink-patch eval.") from failure
    if not isinstance(record, dict) or not isinstance(record.get("measure"), str):
        raise SinkArgumentError(f"{path} does not say what was measured. Give a file that sink-patch eval has written.")
    return record
