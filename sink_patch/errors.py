"""Every error and warning that sink_patch raises, in one place.

All errors derive from `SinkPatchError` and from the built-in exception that fits, so that callers may catch either.
Each message says what was asked, what is the matter, and what to do.
"""

from __future__ import annotations

import sys
import warnings


class SinkPatchError(Exception):
    """Base class of all errors of sink_patch."""


class SinkArgumentError(SinkPatchError, ValueError):
    """An argument of `generate`, of a config or of `SinkCache` is wrong, or clashes with another one."""


class UnsupportedModelError(SinkPatchError, NotImplementedError):
    """The model cannot stream with attention sinks, or nothing proves that it can."""


class AdapterMismatchError(UnsupportedModelError):
    """The model's keys do not turn as the family's adapter says (found by the probe)."""


class UnsupportedGenerationError(SinkPatchError, NotImplementedError):
    """A decoding mode or an option of `generate` that cannot be right with a sink cache."""


class UnsupportedTransformersError(SinkPatchError, ImportError):
    """The installed transformers cannot be patched."""


class CacheStateError(SinkPatchError, RuntimeError):
    """The `SinkCache` is not in a state in which this call could be right."""


class UnboundCacheError(CacheStateError):
    """A `SinkCache` met a forward of a model that it is not bound to."""

    @classmethod
    def never(cls, caller: str, window_length: int, num_sink_tokens: int) -> UnboundCacheError:
        """The cache has no model at all."""
        return cls(
            f"This SinkCache is not bound to the {caller} that it was passed to, so nothing is known of how its keys "
            f"turn. Make it with SinkCache({window_length}, {num_sink_tokens}, model=model)."
        )

    @classmethod
    def elsewhere(cls, cache: str, caller: str) -> UnboundCacheError:
        """The cache has another model, or a part of its own was called."""
        return cls(
            f"{cache} was passed to a {caller} that it is not bound to, or that was not called as a whole. Call the "
            "model itself, with a cache made by SinkCache(..., model=model)."
        )


class CacheFileError(SinkPatchError, ValueError):
    """A file holds no `SinkCache`, or none with which this model could go on."""


class UnpicklableCacheError(SinkPatchError, TypeError):
    """A `SinkCache` was to be pickled, which would part it from its model."""

    @classmethod
    def of(cls, cache: str) -> UnpicklableCacheError:
        return cls(
            f"{cache} cannot be pickled: a pickle does not know its model. Use cache.save(path) and "
            "SinkCache.load(path, model=model); clone() copies it in memory."
        )


class FamilyClashError(SinkPatchError, ValueError):
    """Two different families claim one `model_type`."""


class SinkPatchWarning(UserWarning):
    """Something of sink_patch is switched off or broken, and transformers goes on without it."""


def tell(message: str) -> None:
    """Warn, or print where warnings are errors: what is told during an import must not break it."""
    try:
        warnings.warn(message, SinkPatchWarning, stacklevel=3)
    except SinkPatchWarning:
        print(f"SinkPatchWarning: {message}", file=sys.stderr)
