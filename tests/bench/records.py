"""Records of benchmarks: their figures, and the machine and versions that they were measured with."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers


def write(path: Path | None, **figures: Any) -> None:
    """Write figures to `path`, with the machine and versions; None: do not write."""
    if path is None:
        return
    measured_with = {
        "machine": platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
    }
    path.write_text(json.dumps({**measured_with, **figures}, indent=1) + "\n")


def commit() -> str | None:
    """The commit of the checkout, with a + if files differ from it; None: no git."""
    asked = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(
            asked, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
