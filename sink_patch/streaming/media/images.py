"""The images of a forward or a call one by one, known again by digests: a later turn leaves out those that were read.

`generate` wants the whole history, all its images among it, as processors make them. A stream that has read one image
of 16 tokens is given two, and 40 columns of which 24 are new:

    pixel_values   [2, 3, 32, 32]   the first is the one that was read, by its digest: the second goes to the model
    image_sizes    [2, 2]           the second
    input_ids      [1, 40]          the last 24, in which 16 stand for an image
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sink_patch.models.families.media import KINDS, Kind, media_of, media_tokens
from sink_patch.rules.media import images_of_rows
from sink_patch.streaming.media.given import media_among
from sink_patch.streaming.media.placing import of_images

UNKNOWN = ""
"""In place of the digests of images that were read and cannot be told apart."""
OF_IMAGES = frozenset(name for kind in KINDS for name in (*kind.inputs, *kind.beside))
"""All arguments that hold images, or tell something of each."""
NUMBERS = "batch_num_images"
"""The argument that tells how many images each row has, [rows]."""


@dataclass(frozen=True)
class Images:
    """All images of one kind.

    Args:
        kind: of them.
        parts: of each argument what belongs to each of them, in their order.
        digests: of each.
        sizes: of each, in any unit.
        of_row: to which row each belongs, where the arguments have rows.
    """

    kind: Kind
    parts: Mapping[str, Sequence[torch.Tensor]]
    digests: Sequence[str]
    sizes: Sequence[int]
    of_row: Sequence[int] | None = field(default=None)

    def in_rows(self, ids: torch.Tensor, config: Any) -> list[list[int]] | None:
        """Which of them belong to each row of ids [rows, columns]; None: that cannot be said."""
        if self.of_row is not None:
            return [[one for one, row in enumerate(self.of_row) if row == number] for number in range(len(ids))]
        if len(ids) == 1:
            return [list(range(len(self.digests)))]
        if not self.kind.grids or self.kind.grids not in self.parts:  # then their sizes are known if they are alike
            beside = [parts for name, parts in self.parts.items() if name in self.kind.beside]
            if not all(torch.equal(parts[0], part) for parts in beside for part in parts):
                return None
        columns = of_images(ids, media_tokens(config, [self.kind])).sum(dim=1)  # [rows]
        found = images_of_rows(columns.tolist(), self.sizes)
        return None if found is None else [list(images) for images in found]

    def arguments(self, kept: Sequence[int], rows: int) -> dict[str, Any]:
        """The arguments with some of them alone; None where none is left."""
        if not kept:
            return dict.fromkeys(self.parts)
        if self.of_row is None:
            return {name: torch.cat([parts[one] for one in kept]) for name, parts in self.parts.items()}
        width, found = max(sum(self.of_row[one] == row for one in kept) for row in range(rows)), dict[str, Any]()
        for name, parts in self.parts.items():
            found[name] = parts[0].new_zeros(rows, width, *parts[0].shape[1:])  # [rows, images, ...]
            for row in range(rows):
                for place, one in enumerate(one for one in kept if self.of_row[one] == row):
                    found[name][row, place] = parts[one][0]
        return found


def images_among(model: nn.Module, named: Mapping[str, Any]) -> list[Images] | None:
    """The images among arguments; None: they cannot be told apart."""
    beside = frozenset[str]().union(*(kind.beside for kind in KINDS))
    given = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
    lists = {name: value for name, value in named.items() if name in beside and isinstance(value, list)}
    try:
        given |= {name: torch.as_tensor(value, device="cpu") for name, value in lists.items()}
    except (TypeError, ValueError):  # lists of tensors, or of lists of different length
        return None
    found = [_of_kind(model, kind, given) for kind in KINDS if given.keys() & set(kind.inputs)]
    known = {name for images in found if images is not None for name in images.parts}
    return None if None in found or not known.issuperset(media_among(model, named)) else [x for x in found if x]


def _of_kind(model: nn.Module, kind: Kind, given: Mapping[str, torch.Tensor]) -> Images | None:
    held = {name: value for name, value in given.items() if name in kind.inputs or name in kind.beside}
    media = media_of(getattr(model, "config", None))
    if media is not None and media.by_rows:
        return _of_rows(kind, held)
    grids = held.get(kind.grids)
    count = min(len(value) for value in held.values())
    patches = [] if grids is None else grids.prod(dim=-1).tolist()
    parts = dict[str, Sequence[torch.Tensor]]()
    for name, value in held.items():
        if len(value) == count:
            parts[name] = torch.split(value, 1)
        elif sum(patches) == len(value):
            parts[name] = torch.split(value, patches)
        else:
            return None
    return Images(kind, parts, _digests(kind, parts), patches or [1] * count)


def _of_rows(kind: Kind, held: Mapping[str, torch.Tensor]) -> Images | None:
    """Of arguments [rows, images, ...], in which zeros are none."""
    pixels = next((value for name, value in held.items() if name in kind.inputs), None)
    if pixels is None or any(value.shape[:2] != pixels.shape[:2] for value in held.values()):
        return None
    places = pixels.flatten(2).any(dim=2).nonzero().tolist()
    parts = {name: [value[row, place][None] for row, place in places] for name, value in held.items()}
    return Images(kind, parts, _digests(kind, parts), [1] * len(places), [row for row, _ in places])


def _digests(kind: Kind, parts: Mapping[str, Sequence[torch.Tensor]]) -> list[str]:
    """Of each image, with all that is told of it; what pads it beside larger ones is no part of it."""
    found = list[str]()
    for images in zip(*parts.values(), strict=True):
        digest = hashlib.blake2b(digest_size=16)
        for name, image in sorted(zip(parts, images, strict=True)):
            content = _trimmed(image.detach().cpu())
            digest.update(f"{name} {content.dtype} {list(content.shape)} ".encode())
            digest.update(content.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        found.append(_mark(kind) + digest.hexdigest())
    return found


def of_kind(digests: Sequence[str], kind: Kind) -> list[str]:
    """Those among digests that are of images of one kind."""
    return [digest for digest in digests if digest.startswith(_mark(kind))]


def _mark(kind: Kind) -> str:
    """How the digests of a kind begin."""
    return kind.name[0]


def _trimmed(image: torch.Tensor) -> torch.Tensor:
    """Without the zeros at the end of each dimension."""
    for dim in range(image.ndim):
        if image.numel() and not bool(image.select(dim, -1).any()):
            filled = image.movedim(dim, 0).flatten(1).any(dim=1) if image.ndim > 1 else image != 0
            image = image.narrow(dim, 0, int(filled.nonzero().max()) + 1 if bool(filled.any()) else 0)
    return image


def digests_by_row(images: Sequence[Images] | None, ids: torch.Tensor, config: Any) -> list[tuple[str, ...]]:
    """The digests of the images that a forward or a call brings to each row, in their order.

    Args:
        images: None: they cannot be told apart.
        ids: of it, [rows, columns].
    """
    unknown: list[tuple[str, ...]] = [(UNKNOWN,)] * len(ids)
    found: list[tuple[str, ...]] = [()] * len(ids)
    for of_kind in [None] if images is None else images:
        placed = None if of_kind is None else of_kind.in_rows(ids, config)
        if of_kind is None or placed is None:
            return unknown
        found = [(*one, *(of_kind.digests[image] for image in row)) for one, row in zip(found, placed, strict=True)]
    return found
