"""The steps of the next tokens of full windows, made some at a time, as each is like the one before it.

Most forwards of a long text bring one token to rows whose windows are full. To plan such a forward, and to make its
small tensors, takes several times as long between the layers of a model, whose code has taken the place of ours in the
processor's caches, as it takes to do the same for some forwards one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sink_patch.buffers.devices import queue_of, tensors_last
from sink_patch.buffers.store import LayerStore
from sink_patch.history.leaving import Leaving
from sink_patch.rules.plans import RowPlan
from sink_patch.rules.rows import Row
from sink_patch.streaming.inputs import replaced_inputs
from sink_patch.streaming.steps.planning import Planner
from sink_patch.streaming.steps.step import Step

_AT_ONCE = 16


class StepAhead(Step):
    """A step of one token in each row that is made before its forward, with all that this takes.

    `replaced` is what the model receives in place of its arguments.

    Args:
        rows, rows_after: before and after the forward.
        planner, store: of the cache.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        plans: Sequence[RowPlan],
        rows_after: list[Row],
        device: torch.device,
        planner: Planner,
        store: LayerStore,
    ):
        super().__init__(plans, 1, store.kinds, device)
        self.rows, self.rows_after = rows, rows_after
        self.replaced = replaced_inputs(self, planner.facts, None)


class StepsAhead:
    """Makes them as any others are made (`Planner`, `Step`), for the rows as forward after forward will leave them.

    `left` are the rows as the last forward left them. Whatever else is done to rows makes another list of them; so what
    was made for these very rows holds as long as they are the rows of the cache.

    Args:
        planner, store, leaving: of the cache.
    """

    def __init__(self, planner: Planner, store: LayerStore, leaving: Leaving):
        self._planner, self._store, self._leaving = planner, store, leaving
        self.left: Sequence[Row] | None = None
        self._made: list[StepAhead] = []  # the next one last
        self._where: tuple[Any, ...] = ()  # they were made

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes its own."""
        return {**vars(self), "left": None, "_made": [], "_where": ()}

    def taken(self, rows: Sequence[Row] | None, inputs: torch.Tensor) -> StepAhead | None:
        """The step of a forward that brings one token to each row; None: it must be planned by itself.

        Not before two forwards have followed each other without anything between them.

        Args:
            rows: of the cache.
            inputs: of the forward, [rows, 1] or [rows, 1, hidden].
        """
        if rows is None or rows is not self.left or inputs.shape[0] != len(rows):
            return None
        device = inputs.device
        where = device, torch.is_grad_enabled(), queue_of(device)
        if not self._made or self._made[-1].rows is not rows or self._where != where:
            self._made, self._where = self._made_for(rows, *where), where
        return self._made.pop() if self._made else None

    def _made_for(self, rows: Sequence[Row], device: torch.device, has_grad: bool, _queue: int) -> list[StepAhead]:
        """Steps from these rows on, the next one last; none where they are not as the one before it."""
        made, first = list[StepAhead](), rows[0]
        are_full = all(kind.is_the_buffer(1) and kind.count(first) >= kind.slots for kind in self._store.kinds)
        if not are_full or any(row != first for row in rows):
            return made
        if not self._leaving.single_tokens_leave(rows) or not tensors_last(device):
            return made
        # else what is made in inference mode could not be changed outside it
        with torch.inference_mode(False), torch.set_grad_enabled(has_grad):
            while len(made) < _AT_ONCE and (plans := self._planner.next_plans(rows)):
                after = [row.after(1, self._store.slots) for row in rows]
                made.append(StepAhead(rows, plans, after, device, self._planner, self._store))
                rows = after
        return made[::-1]
