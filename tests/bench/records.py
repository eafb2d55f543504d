"""What every record says beside its figures."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers


def write(path: Path | None, **figures: Any) -> None:
    """Write figures, and what they were measured with; None: do not."""
    if path is None:
        return
    measured_with = {
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    path.write_text(json.dumps({**measured_with, **figures}, indent=1) + "\n")
