"""The sinks of all layers: kept as the model made them, and turned together before the first layer runs.

Sinks walk forward while the ring stays (arXiv 2309.17453, section 3.2: positions within the cache). With a window of 5,
2 sinks and a ring of 3, the forward of token 7 sees tokens 5, 6 and 7 where the model placed them; the sinks, made at
positions 0 and 1, are shown just before them, at 3 and 4, so they are turned by 3:

    position   0   1   2   3   4   5   6   7
    made at    s0  s1
    shown at               s0  s1  t5  t6  t7

They are turned from their pristine copy each time, in float32, and rounded once, so that no error grows.

All layers at once: rings that turn alike share one pristine tensor, so that a few operations turn the sinks of all of
them. Once buffers stay where they are, they are brought side by side in memory, some rings in one piece, so that one
copy shows the sinks of so many rings:

    pristine   [ring 0 | ring 1 | ... ]            one tensor [rings, rows, heads, num_sink_tokens, dim]
    crossed    [ring 0 | ring 1 | ... ]            its rotary dims once more, as they turn by the sine
    turned     [ring 0 | ring 1 | ... ]            its rotary dims in float32, for the next forwards [turns, rings, ...]
    buffers    [s s r r r | s s r r r | ... ]      one tensor [rings, rows, heads, slots, dim]; s: where the sinks go
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from sink_patch.buffers.layouts import Layout
from sink_patch.buffers.rings import Ring
from sink_patch.buffers.rotation import Turn
from sink_patch.buffers.sinks.group import Group, stack


class Sinks:
    """The only owner of pristine sinks, and of where they are shown.

    A ring tells it of new sinks and of another buffer by itself. Each ring carries its own, [rows, heads,
    num_sink_tokens, dim], as the model made them: a graph goes through here where a prompt is read, and torch up to
    2.9 (or later) traces no dict whose keys are objects.

    Args:
        rings: all that have sinks which turn with position.
    """

    def __init__(self, rings: Sequence[Ring]):
        self._rings = tuple(rings)
        self._groups: list[Group] | None = None  # None: to be made anew
        self._shown: tuple[int, ...] | None = None  # how far the sinks in the buffers are turned, row by row
        self._side_by_side = False
        for ring in rings:
            ring.owner = self

    def __getstate__(self) -> dict[str, Any]:
        """A copy groups its own rings: not on every device are copies of views views of the copy."""
        return {**vars(self), "_groups": None, "_shown": None, "_side_by_side": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        for ring in self._rings:
            ring.owner = self

    def pristine_of(self, ring: Ring) -> torch.Tensor | None:
        """The sinks of a ring as the model made them, [rows, heads, num_sink_tokens, dim]; None: there are none yet."""
        return ring.pristine

    def put(self, ring: Ring, pristine: torch.Tensor) -> None:
        """Keep sinks that come from elsewhere (a file)."""
        ring.pristine = pristine
        self.buffer_replaced()

    def take(self, ring: Ring, states: torch.Tensor, layout: Layout) -> None:
        """Keep the sinks among new states [rows, heads, columns, dim]."""
        pristine = ring.pristine
        if pristine is None:
            with torch.inference_mode(False):  # else they could not be written to outside it
                shape = (*states.shape[:2], layout.kind.num_sink_tokens, states.shape[3])
                pristine = states.new_zeros(shape)
                ring.pristine = pristine
        self.buffer_replaced()  # what groups have made of the pristine sinks is that of others then
        layout.write_sinks(pristine, states)

    def buffer_replaced(self) -> None:
        """Hold no buffer any more: some ring has got another one, or none."""
        self._groups, self._shown, self._side_by_side = None, None, False

    @torch.inference_mode(False)  # as in `take`
    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep the rows `rows`, in that order."""
        for ring, pristine in self._held():
            self.put(ring, pristine.index_select(0, rows.to(pristine.device)))

    def reset(self) -> None:
        for ring in self._rings:
            ring.pristine = None
        self.buffer_replaced()

    @property
    def nbytes(self) -> int:
        return sum(pristine.nbytes for _, pristine in self._held())

    @property
    def turned_nbytes(self) -> int:
        """Bytes of what turning takes beside the pristine sinks; none before they are shown."""
        return sum(group.turned_nbytes for group in self._groups or ())

    def show(self, turn: Turn) -> None:
        """Turn the sinks in all buffers to where the next forward sees them."""
        groups = self._groups
        if groups is None:
            groups = self._grouped()
        elif self._shown == turn.rows:
            return
        elif not self._side_by_side:  # not in the first forward: after each token where beams are reordered
            self.bring_side_by_side()
        self._shown = None
        for group in groups:
            group.show(turn)
        self._shown = turn.rows

    def bring_side_by_side(self) -> None:
        """Bring the buffers side by side, as they are going to stay."""
        groups = self._grouped()
        if self._side_by_side:
            return
        self._groups = None  # to be made anew if this is interrupted
        for group in groups:
            group.bring_side_by_side()
        self._groups, self._side_by_side = groups, True

    def _grouped(self) -> list[Group]:
        """The rings that turn alike, one group each."""
        if self._groups is None:
            alike = defaultdict(list)
            for ring, pristine in self._held():
                if ring.rotation is not None and ring.buffer is not None:
                    shapes = (pristine.shape, ring.buffer.shape)
                    alike[ring.rotation, ring.buffer.device, ring.buffer.dtype, shapes].append(ring)
            groups = []
            for (rotation, *_), rings in alike.items():
                together = stack([ring.pristine for ring in rings if ring.pristine is not None])
                for ring, pristine in zip(rings, together, strict=True):
                    ring.pristine = pristine
                groups.append(Group(rings, rotation, together))
            self._groups = groups
        return self._groups

    def _held(self) -> list[tuple[Ring, torch.Tensor]]:
        """The rings that have sinks, with these."""
        return [(ring, ring.pristine) for ring in self._rings if ring.pristine is not None]
