"""The releases that are tested: of transformers the last patch of each minor release that changed relevant code."""

from __future__ import annotations

from typing import NamedTuple

VERSIONS = (
    *("4.52.4", "4.53.3", "4.54.1", "4.55.4", "4.56.2", "4.57.6"),
    *("5.0.0", "5.2.0", "5.3.0", "5.4.0", "5.6.2", "5.8.1", "5.10.4"),
    *("5.12.1", "5.14.1", "5.16.1", "5.18.0", "5.20.2", "5.23.0", "5.24.0"),
)
"""Oldest first."""

TORCH, PYTHON = "2.13", "3.11"
"""Those of CI: every version of transformers is tested with them."""


class Beside(NamedTuple):
    """Another torch and another Python, with some versions of transformers: tried by hand, as it takes gigabytes."""

    torch: str
    python: str
    transformers: tuple[str, ...]


OTHERS = (
    Beside("2.6.0", "3.10", ("4.52.4", "5.20.2")),
    Beside("2.9.1", "3.12", ("5.24.0",)),
    Beside("2.14.1", "3.11", ("5.24.0",)),
    Beside("2.15.0", "3.13", ("5.24.0",)),
)
"""What pyproject.toml claims of torch and Python is what stands here, and the two of CI."""

LEAST = {"msgspec": "0.18", "packaging": "23", "safetensors": "0.4.4", "tqdm": "4.60", "wrapt": "1.16"}
"""The oldest versions of what we depend on beside torch, as in pyproject.toml."""
BESIDE = {
    VERSIONS[0]: tuple(f"{name}=={version}" for name, version in LEAST.items()),
    "5.4.0": ("huggingface-hub==1.8.0",),
}
"""Other packages for a version: the oldest has the oldest of all, and 5.4 does not work with the newest hub, as 1.33
refuses defaults of its configs."""
