"""Which shim serves which transformers."""

from __future__ import annotations

import functools
import importlib

from packaging.specifiers import SpecifierSet
from packaging.version import Version
from sink_patch.compat.shim import Shim

from sink_patch.errors import UnsupportedTransformersError, tell

TABLE = (
    (SpecifierSet(">=4.52,<4.53"), "sink_patch.compat.v4_52"),
    (SpecifierSet(">=4.53,<4.54"), "sink_patch.compat.v4_53"),
    (SpecifierSet(">=4.54,<4.56"), "sink_patch.compat.v4_54"),
    (SpecifierSet(">=4.56,<4.57"), "sink_patch.compat.v4_56"),
    (SpecifierSet(">=4.57,<5.0"), "sink_patch.compat.v4_57"),
    (SpecifierSet(">=5.0,<5.4"), "sink_patch.compat.v5_0"),
    (SpecifierSet(">=5.4,<5.5"), "sink_patch.compat.v5_4"),
    (SpecifierSet(">=5.5,<5.7"), "sink_patch.compat.v5_5"),
    (SpecifierSet(">=5.7,<5.11"), "sink_patch.compat.v5_7"),
    (SpecifierSet(">=5.11,<5.15"), "sink_patch.compat.v5_11"),
    (SpecifierSet(">=5.15,<5.25"), "sink_patch.compat.newest"),
)
OLDEST, NEWEST = "4.52", "5.24"


@functools.cache  # a version that is not known is complained of once
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


def installed_shim() -> Shim:
    """The shim for the transformers that is installed.

    Raises:
        UnsupportedTransformersError: it is too old.
    """
    import transformers

    return choose_shim(transformers.__version__)


def _load(module: str) -> Shim:
    shim: Shim = importlib.import_module(module).SHIM
    return shim
