"""Which shim serves which transformers."""

from __future__ import annotations

import functools

from packaging.version import Version

from sink_patch.compat import v4, v5
from sink_patch.compat.shim import Shim
from sink_patch.errors import UnsupportedTransformersError, tell

TABLE = (*v5.SHIMS, *v4.SHIMS)
"""Newest first."""
OLDEST, NEWEST = "4.52", "5.24"


@functools.cache  # a version that is not known is complained of once
def choose_shim(found: str) -> Shim:
    """The shim for a version of transformers; the newest one, with a warning, for a version newer than all known.

    Raises:
        UnsupportedTransformersError: the version is too old.
    """
    version = Version(Version(found).base_version)  # a release candidate is like its release
    for shim in TABLE:
        if shim.versions.contains(version):
            return shim
    if version < Version(OLDEST):
        raise UnsupportedTransformersError(
            f"sink_patch needs transformers {OLDEST} or newer, and found {found}. Upgrade it: "
            f'pip install --upgrade "transformers>={OLDEST}".'
        )
    tell(f"sink_patch was tested with transformers {OLDEST} to {NEWEST}, and found {found}. It works as with {NEWEST}.")
    return TABLE[0]


def why_not_traced() -> str | None:
    """Why the installed torch cannot compile the models of the installed transformers; None: it can."""
    import torch
    import transformers

    traced_by = installed_shim().traced_by
    if traced_by.contains(Version(torch.__version__).base_version):
        return None
    return (
        f"torch {torch.__version__} cannot compile the models of transformers {transformers.__version__}, which takes "
        f"torch{traced_by}"
    )


@functools.cache  # a forward asks for it
def installed_shim() -> Shim:
    """The shim for the transformers that is installed.

    Raises:
        UnsupportedTransformersError: it is too old.
    """
    import transformers

    return choose_shim(transformers.__version__)
