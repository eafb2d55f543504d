"""The arguments of a model's forward: by name, those that the cache has read already, and those that it replaces."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sink_patch.compat import installed_shim
from sink_patch.models.facts import ModelFacts
from sink_patch.rules.columns import Columns
from sink_patch.streaming.media.cut import Cut
from sink_patch.streaming.media.given import media_among, without_media
from sink_patch.streaming.media.images import UNKNOWN
from sink_patch.streaming.steps.step import Step

_OF_THE_STREAM = ("attention_mask", "position_ids")  # which the cache replaces


@dataclass
class Call:
    """The call of `generate` in progress over a cache.

    Args:
        columns: which of its columns are new. After those of the stream come single tokens, which are never padding.
        drafting: whether drafts follow the prompt in the first forward.
        images: digests of the images that it brings, row by row.
        media: the arguments that hold these in a later turn, and tell of them: some versions hand them on in a first
            prompt alone, and some to encoders alone.
        cut: how the first forward goes in by pieces, whose images are in place when the decoder is called; None: not
            by itself.
        without_images: whether all images of the call are in, as what stands before its last tokens has gone in.
    """

    columns: Columns
    drafting: bool = False
    cut: Cut | None = None
    images: Sequence[tuple[str, ...]] = ()
    media: Mapping[str, Any] = field(default_factory=dict)
    without_images: bool = False
    _has_begun: bool = False

    def is_past_prompt(self, read: int) -> bool:
        """Whether the prompt is in when the cache has read so many columns."""
        return read >= self.columns.stream

    def with_media(self, module: nn.Module, named: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a forward, the first one of the call with all of its images that are not in."""
        if self.without_images and not self._has_begun:
            return dict(without_media(module, named))
        if self._has_begun or not self.media or media_among(module, named):
            return named
        missing = {name: value for name, value in self.media.items() if named.get(name) is None}
        return {**named, **accepted(module, missing, named)}

    def take_images(self) -> Sequence[tuple[str, ...]]:
        """The digests of the images, once."""
        images, self.images = self.images, ()
        return images

    def images_of_piece(self, rows: int) -> tuple[Sequence[tuple[str, ...]], int]:
        """What a piece of a prompt that is cut brings: digests, and in place of how many that were noted before.

        All are noted with the last piece; until then it is not known which of them are read.
        """
        if self.cut is None or not self.cut.is_fed:
            return [(UNKNOWN,)] * rows, 0
        return self.take_images(), self.cut.ahead

    def read_again(self, inputs: torch.Tensor, attention_mask: Any, read: int) -> int:
        """How many columns at the start of the inputs [rows, columns, ...] of a forward the cache has read already.

        Only the first forward of a call may bring such columns: all of a history, say, of which a part has gone in.
        """
        if self._has_begun:
            return 0
        self._has_begun = True
        end = self.columns.stream
        if self.drafting:
            end = inputs.shape[1] if attention_mask is None else attention_mask.shape[-1]
        already_read = inputs.shape[1] - (end - read)  # more than was read: the model puts columns of its own in front
        return max(0, min(already_read, read))


def without_columns(named: dict[str, Any], inputs: torch.Tensor, count: int) -> dict[str, Any]:
    """The arguments of a forward without so many columns at the start: of `inputs`, and of all that goes with them.

    Args:
        inputs: ids or embeddings of the forward, [rows, columns, ...].
    """
    if not count:
        return named
    of_columns = {
        name: value[:, count:]
        for name, value in named.items()
        if isinstance(value, torch.Tensor) and value.shape[:2] == inputs.shape[:2] and name not in _OF_THE_STREAM
    }
    return {**named, **of_columns}


def replaced_inputs(step: Step, facts: ModelFacts, attention_mask: Any) -> dict[str, torch.Tensor | None]:
    """What a model is to receive in place of what it was given: RoPE positions, and a mask over what it sees.

    Args:
        attention_mask: what it was given, None or [rows, columns].
    """
    if not step.layouts:  # states alone: what is padding in this forward is all that matters
        unpadded = attention_mask is None or step.columns == 1
        return {"attention_mask": None if unpadded else attention_mask[:, -step.columns :]}
    replaced: dict[str, torch.Tensor | None] = {"attention_mask": step.attention_mask(explicit=facts.explicit_mask)}
    if facts.position_source == "position_ids":
        replaced["position_ids"] = step.position_ids()
    if installed_shim().passes_cache_position:
        replaced["cache_position"] = step.mask_coordinates()
    return replaced


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a module's forward by name."""
    return {**dict(zip(_names(type(module).forward), args, strict=False)), **kwargs} if args else kwargs


def accepted(module: nn.Module, replaced: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the replaced arguments that the forward of a module takes.

    Args:
        replaced: by name.
        given: what the caller has given. A forward without the name of one of these reads it from its `**kwargs`, or
            hands it on.
    """
    names = _accepted_names(type(module).forward)
    return {name: value for name, value in replaced.items() if name in names or name in given}


@functools.lru_cache(maxsize=256)
def _accepted_names(forward: Callable[..., Any]) -> frozenset[str]:
    parameters = inspect.signature(forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    # "cache_position" of ours among the others would reach attention functions that know nothing of it
    return frozenset(parameters).union(("position_ids", "attention_mask") if takes_any else ())


@functools.lru_cache(maxsize=256)
def _names(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]  # without self
