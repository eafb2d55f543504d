"""Which shim serves which transformers."""

from __future__ import annotations

import importlib

from packaging.specifiers import SpecifierSet
from packaging.version import Version
from sink_patch.compat.shim import Shim

from sink_patch.errors import UnsupportedTransformersError, tell

TABLE = ((SpecifierSet(">=5.23,<5.24"), "sink_patch.compat.newest"),)
OLDEST, NEWEST = "5.23", "5.23"


def choose_shim(found: str) -> Shim:
    """The shim for a version of transformers; the newest one, with a warning, for a version newer than all known.

    Raises:
        UnsupportedTransformersError: the version is too old.
    """
    version = Version(Version(found).base_version)  # a release candidate is like its release
    for specifier, module in TABLE:
        if specifier.contains(version):
            return _load(module)
    if version < Version(OLDEST):
        raise UnsupportedTransformersError(
            f"sink_patch needs transformers {OLDEST} or newer, and found {found}. Upgrade it: "
            f'pip install --upgrade "transformers>={OLDEST}".'
        )
    tell(f"sink_patch was tested with transformers {OLDEST} to {NEWEST}, and found {found}. It works as with {NEWEST}.")
    return _load(TABLE[-1][1])


def _load(module: str) -> Shim:
    shim: Shim = importlib.import_module(module).SHIM
    return shim
