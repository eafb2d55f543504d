"""The images that a call of `generate` brings, noted on its generation config until its prompt goes in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from sink_patch.streaming.media.images import UNKNOWN, Images, digests_by_row

_NAME = "_images_of_call"


@dataclass(frozen=True)
class Brought:
    """The images of a call.

    Args:
        images: of a first prompt; None: they cannot be told apart.
        digests: row by row.
        media: of a later turn, the arguments that hold them.
        given: the arguments of the call with images, as they were left to the model.
    """

    images: Sequence[Images] | None
    digests: Sequence[tuple[str, ...]] = ()
    media: Mapping[str, Any] = field(default_factory=dict)
    given: Sequence[Any] = ()

    def is_of(self, given: Sequence[Any]) -> bool:
        """Whether these are the arguments of the call: a config may be prepared twice for one, or used for two."""
        return len(given) == len(self.given) and all(one is two for one, two in zip(given, self.given, strict=True))

    def __deepcopy__(self, _memo: dict[int, Any]) -> Brought:
        return self  # nothing of it changes, and images are large


def note(generation_config: Any, images: Brought) -> None:
    """Of the call whose config that is, which is a copy of its own."""
    setattr(generation_config, _NAME, images)


def noted_on(generation_config: Any) -> Brought | None:
    """What was noted on it."""
    found: Brought | None = vars(generation_config).get(_NAME)
    return found


def brought(model: nn.Module, generation_config: Any, ids: torch.Tensor | None) -> Brought:
    """The images that a call brings to its rows.

    Args:
        ids: of it, [rows, columns]; None: it brings none.
    """
    found: Brought = vars(generation_config).pop(_NAME, Brought(None))
    if ids is None:
        return found
    if expands(generation_config):
        return replace(found, digests=[(UNKNOWN,)] * len(ids))
    return found if found.digests else replace(found, digests=digests_by_row(found.images, ids, model.config))


def expands(generation_config: Any) -> bool:
    """Whether each row becomes several."""
    return max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1) > 1
