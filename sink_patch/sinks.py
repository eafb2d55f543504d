"""The sinks of all layers, turned together before the first layer runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from sink_patch.layers import Ring
from sink_patch.step import Step


class Sinks:
    """Where the sinks of a cache are kept as the model made them, and where they are shown.

    Rings that turn alike and lie on one device share a tensor, so that a few operations turn them all. It is made anew
    where a ring has got another buffer.

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

    def show(self, step: Step) -> None:
        """Turn the sinks to where the forward sees them."""
        if any(ring.buffer is not held for ring, held in zip(self._rings, self._buffers, strict=True)):
            self._gather()
        if self._shown == step.sink_turn.rows:
            return
        self._shown = None
        for group in self._groups:
            group.show(step)
        self._shown = step.sink_turn.rows

    def _gather(self) -> None:
        self._shown = None
        alike = defaultdict(list)
        for ring in self._rings:
            if ring.pristine is not None:
                alike[id(ring.rotation), ring.pristine.device, ring.pristine.dtype, ring.pristine.shape].append(ring)
        self._groups = [_Group(rings) for rings in alike.values()]
        self._buffers = [ring.buffer for ring in self._rings]


class _Group:
    """Rings that turn alike, on one device."""

    @torch.inference_mode(False)  # as the rings' own buffers (layers.py)
    def __init__(self, rings: Sequence[Ring]):
        self._rotation = rings[0].rotation
        self._pristine = torch.stack([ring.pristine for ring in rings if ring.pristine is not None])
        turned = torch.empty_like(self._pristine)  # [rings, rows, heads, num_sink_tokens, dim]
        self._turned, self._of_rings = turned, list(turned)
        self._shown_in = []  # [rows, heads, num_sink_tokens, dim] each
        for ring, pristine in zip(rings, self._pristine, strict=True):
            ring.pristine = pristine
            self._shown_in.append(ring.buffer[:, :, : pristine.shape[2]] if ring.buffer is not None else pristine)

    def show(self, step: Step) -> None:
        if self._rotation is None:
            return
        cos_sin = step.sink_turn.cos_sin(self._rotation, self._pristine.device)
        self._rotation.apply(self._pristine, cos_sin, self._turned)
        torch._foreach_copy_(self._shown_in, self._of_rings)
