"""The sinks of rings that turn alike, in few operations: some turns at once, and one copy for many rings."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sink_patch.buffers.devices import queue_of, tensors_last
from sink_patch.buffers.rings import Ring
from sink_patch.buffers.rotation import Rotation, Turn, turn_dims

_AHEAD, _MOST_AHEAD = 8, 2**21  # turns that are made at once, and their bytes at most
_PIECE = 2**26  # bytes in one piece of memory; while rings are brought there, so much is held twice


class Group:
    """Rings of one shape that turn alike, on one device.

    Args:
        pristine: the sinks of all of them, [rings, rows, heads, num_sink_tokens, dim].
    """

    @torch.inference_mode(False)  # as in `Sinks.take`
    def __init__(self, rings: Sequence[Ring], rotation: Rotation, pristine: torch.Tensor):
        self._rings, self._rotation, self._pristine, self._device = rings, rotation, pristine, pristine.device
        self._dims = rotation.turning(pristine)  # [rings, rows, heads, num_sink_tokens, rotary_dim]
        self._crossed = rotation.crossed(self._dims)
        count = max(1, min(_AHEAD, _MOST_AHEAD // (4 * self._dims.numel())))
        self._turned = self._dims.new_empty(count, *self._dims.shape, dtype=torch.float32)
        self._ahead: dict[tuple[tuple[int, ...], int], list[torch.Tensor]] = {}  # parts of it, by turn and queue
        self._newest: tuple[int, ...] = ()  # how far they were turned last
        self._from = [list(turned) for turned in self._turned]
        self._to = [self._sinks_of(ring.buffer) for ring in rings if ring.buffer is not None]

    @property
    def turned_nbytes(self) -> int:
        return self._turned.nbytes + self._crossed.nbytes

    def show(self, turn: Turn) -> None:
        """Turn the sinks of all of them in their buffers."""
        queue = queue_of(self._device)
        turned = self._ahead.get((turn.rows, queue))
        if turned is None:
            turned = self._made(turn, queue)
        self._newest = turn.rows
        if len(turned) == 1:
            self._to[0].copy_(turned[0])
        else:
            torch._foreach_copy_(self._to, turned)

    def _made(self, turn: Turn, queue: int) -> list[torch.Tensor]:
        """They turned; where this is one position on from the last time, by some turns that may follow as well."""
        follows = self._newest and all(new == old + 1 for new, old in zip(turn.rows, self._newest, strict=True))
        most = len(self._turned) if follows and tensors_last(self._device) else 1
        cos, sin = turn.following(self._rotation, self._device, most)  # [turns, rows, 1, 1, rotary_dim]
        self._ahead = {}  # what it holds is overwritten
        turn_dims(self._dims, self._crossed, (cos[:, None], sin[:, None]), self._turned[: len(cos)])
        for number in range(1, len(cos)):
            self._ahead[tuple([row + number for row in turn.rows]), queue] = self._from[number]
        return self._from[0]

    def bring_side_by_side(self) -> None:
        """Bring the rings' buffers side by side, some at a time."""
        most = _PIECE // max(ring.buffer.nbytes for ring in self._rings if ring.buffer is not None)
        if min(most, len(self._rings)) <= 1:
            return  # there is nothing to lie beside
        pieces = [slice(first, first + most) for first in range(0, len(self._rings), most)]
        self._to = []
        self._from = [[turned[some] for some in pieces] for turned in self._turned]
        for some in pieces:
            buffers = stack([ring.buffer for ring in self._rings[some] if ring.buffer is not None])
            for ring, buffer in zip(self._rings[some], buffers, strict=True):
                ring.buffer = buffer.data  # no view: else autograd takes a write to one for a write to all
            self._to.append(self._sinks_of(buffers))

    def _sinks_of(self, buffers: torch.Tensor) -> torch.Tensor:
        """What turns of the sinks in buffers [..., slots, dim], as a view; the rest stays as it is."""
        return self._rotation.turning(buffers[..., : self._pristine.shape[-2], :])


@torch.inference_mode(False)  # as in `Sinks.take`
def stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Copies of tensors of one shape, side by side in a new one."""
    return torch.stack(list(tensors))
