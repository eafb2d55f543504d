"""The releases of transformers that are tested: the last patch of each minor release that changed relevant code."""

from __future__ import annotations

VERSIONS = (
    *("4.52.4", "4.53.3", "4.54.1", "4.55.4", "4.56.2", "4.57.6"),
    *("5.0.0", "5.2.0", "5.3.0", "5.4.0", "5.6.2", "5.8.1", "5.10.4"),
    *("5.12.1", "5.14.1", "5.16.1", "5.18.0", "5.20.2", "5.23.0", "5.24.0"),
)
"""Oldest first."""

BESIDE = {"5.4.0": ("huggingface-hub==1.8.0",)}
"""Other packages for a version that does not work with the newest: hub 1.33 refuses defaults of its configs."""
