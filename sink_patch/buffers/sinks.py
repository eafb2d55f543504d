"""The sinks of all layers, turned together before the first layer runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from sink_patch.buffers.rings import Ring
from sink_patch.buffers.rotation import Rotation, turn_pairs
from sink_patch.streaming.steps import Step

_SIDE_BY_SIDE = 8  # rings in one piece of memory; while they are brought there, so many are held twice


class Sinks:
    """Where the sinks of a cache are kept as the model made them, and where they are shown.

    Rings that turn alike and lie on one device share a tensor, so that a few operations turn them all. It is made anew
    where a ring has got another buffer. Where buffers stay, they are brought side by side, so that a few operations
    show the sinks, too.

    Args:
        rings: all that have sinks which turn with position.
    """

    def __init__(self, rings: Sequence[Ring]):
        self._rings = rings
        self.forget()

    def forget(self) -> None:
        """Hold no buffer any more: the rings have got others, or none."""
        self._buffers: list[torch.Tensor | None] = [None for _ in self._rings]
        self._groups: list[_Group] = []
        self._shown: tuple[int, ...] | None = None  # how far they are turned, row by row; None: not known
        self._together = False

    def show(self, step: Step) -> None:
        """Turn the sinks to where the forward sees them."""
        changed = self._gather()
        if self._shown == step.sink_turn.rows:
            return
        if not changed:  # as they do with each token where beams are reordered
            self.bring_together()
        self._shown = None
        for group in self._groups:
            group.show(step)
        self._shown = step.sink_turn.rows

    def bring_together(self) -> None:
        """Bring the buffers side by side, as they are going to stay."""
        self._gather()
        if self._together:
            return
        self._buffers = [None for _ in self._rings]  # the old ones go as they are left
        for group in self._groups:
            group.bring_together()
        self._buffers = [ring.buffer for ring in self._rings]
        self._together = True

    def _gather(self) -> bool:
        """Group the rings anew where some have got other buffers; whether they have."""
        if all(ring.buffer is held for ring, held in zip(self._rings, self._buffers, strict=True)):
            return False
        self._shown, self._together = None, False
        alike = defaultdict(list)
        for ring in self._rings:
            if ring.rotation is not None and ring.pristine is not None and ring.buffer is not None:
                shapes = (ring.pristine.shape, ring.buffer.shape)
                alike[ring.rotation, ring.buffer.device, ring.buffer.dtype, shapes].append(ring)
        self._groups = [_Group(rings, rotation) for (rotation, *_), rings in alike.items()]
        self._buffers = [ring.buffer for ring in self._rings]
        return True


class _Group:
    """Rings of one shape that turn alike, on one device."""

    @torch.inference_mode(False)  # as the rings' own buffers (layers.py)
    def __init__(self, rings: Sequence[Ring], rotation: Rotation):
        self._rings, self._rotation = rings, rotation
        self._pristine = torch.stack([ring.pristine for ring in rings if ring.pristine is not None])
        for ring, pristine in zip(rings, self._pristine, strict=True):
            ring.pristine = pristine
        turned = torch.empty_like(self._pristine, dtype=torch.float32)  # [rings, rows, heads, num_sink_tokens, dim]
        self._pairs, self._turned_pairs = rotation.pairs(self._pristine), rotation.pairs(turned)
        self._turned = rotation.turning(turned)
        self._from = list(self._turned)
        self._to = [self._sinks_of(ring.buffer) for ring in rings if ring.buffer is not None]

    def _sinks_of(self, buffers: torch.Tensor) -> torch.Tensor:
        """What turns of those in buffers [..., slots, dim], as a view; the rest stays as it is."""
        return self._rotation.turning(buffers[..., : self._pristine.shape[-2], :])

    @torch.inference_mode(False)
    def bring_together(self) -> None:
        """Bring the rings' buffers side by side, some at a time."""
        self._from, self._to = [], []
        for first in range(0, len(self._rings), _SIDE_BY_SIDE):
            some = slice(first, first + _SIDE_BY_SIDE)
            buffers = torch.stack([ring.buffer for ring in self._rings[some] if ring.buffer is not None])
            for ring, buffer in zip(self._rings[some], buffers, strict=True):
                ring.buffer = buffer.data  # no view: else autograd takes a write to one for a write to all
            self._from.append(self._turned[some])
            self._to.append(self._sinks_of(buffers))

    def show(self, step: Step) -> None:
        turn_pairs(self._pairs, step.sink_turn.cos_sin(self._rotation, self._pristine.device), self._turned_pairs)
        torch._foreach_copy_(self._to, self._from)
