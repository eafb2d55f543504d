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


class HistoryMismatchError(SinkPatchError, ValueError):
    """A text that is to go on in a `SinkCache` does not begin with what the cache has read."""

    @classmethod
    def elsewhere(cls, name: str, where: range, read: int, columns: int) -> HistoryMismatchError:
        """A history of so many columns differs from what was read at one of these places."""
        last = "" if len(where) == 1 else f", or one of the next {len(where) - 1},"
        return cls(
            f"{_sentence(name)} does not begin with the {read} tokens that this SinkCache has read: from token "
            f"{where.start}{last} on it is another text (thoughts that a chat template strips, turns that were trimmed "
            f"or written anew, another chat). {_GO_ON} (New tokens alone, {columns} or more, need the mask too.)"
        )

    @classmethod
    def shorter(cls, name: str, given: int, common: int, read: int, stream: int) -> HistoryMismatchError:
        """What is no longer than what was read begins as that does."""
        if common == given:
            what = f"are the first of the {read} that this SinkCache has read, so there is nothing new to feed"
        else:
            what = (
                f"begin as the {read} that this SinkCache has read, and differ from token {common} on: a history from "
                "which turns were trimmed, it seems"
            )
        return cls(f"The {given} tokens of {name} {what}. {_GO_ON} {_NEW.format(stream)}")

    @classmethod
    def trimmed(cls, name: str, given: int, read: int, stream: int) -> HistoryMismatchError:
        """What is no longer than what was read holds the end of that."""
        return cls(
            f"The {given} tokens of {name} hold the newest ones of the {read} that this SinkCache has read, and differ "
            "from token 0 on: a history from which the oldest turns were trimmed, it seems. "
            f"{_GO_ON} {_NEW.format(stream)}"
        )

    @classmethod
    def other_images(cls, name: str, read: int, given: int) -> HistoryMismatchError:
        """Of the images of a history the first ones are not those that were read."""
        return cls(
            f"{_sentence(name)} has read {read} images (or videos, sounds) into this SinkCache, and the first ones of "
            f"the {given} that are given are not those, number for number, in this order. Give all images of the "
            "history as they were given before; or the new tokens alone, with their images and an attention_mask over "
            "the whole stream; or leave past_key_values out, and all is read anew."
        )


_GO_ON = (
    "Pass the ids that generate returned with new ones behind them, or the new ones alone with an attention_mask over "
    "the whole stream; or leave past_key_values out, and the text is read anew."
)
_NEW = "(If they are new tokens, pass an attention_mask of {} columns.)"


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:] if words.startswith("row") else words


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
