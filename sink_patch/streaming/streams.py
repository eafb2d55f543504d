"""How one forward over a cache begins and ends."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn

from sink_patch.buffers.store import LayerStore
from sink_patch.errors import CacheStateError, UnsupportedGenerationError
from sink_patch.rules.plans import RowPlan
from sink_patch.rules.rows import Row
from sink_patch.streaming.fixed.steps import FixedSteps
from sink_patch.streaming.forward import Phase
from sink_patch.streaming.inputs import Call, replaced_inputs
from sink_patch.streaming.media.coordinates import Coordinates
from sink_patch.streaming.rows import Rows
from sink_patch.streaming.steps.ahead import StepAhead, StepsAhead
from sink_patch.streaming.steps.planning import Planner
from sink_patch.streaming.steps.step import Step


class Streams(Rows):
    """The streams of a cache that is bound to a model: its rows, and their forwards.

    With a window of 5, 2 sinks, a horizon of 8 and 7 tokens seen, a forward of one token finds that its position would
    be 7, which is below the horizon. So it is planned to see sinks 0 and 1 at positions 3 and 4, tokens 5 and 6 where
    they are, and the new token at 7, which goes into the slot of token 4. The next one would be at 8: all keys are
    turned back by 4 first, so that the new token is at 4 again, and `base` is 4 from then on.

    `call` is what is known of the call of `generate` in progress, None outside; `coordinates` of what the model makes.

    Args:
        planner: the rules, with the sizes of the cache.
        store: the layers of the cache.
        entrances: the modules at which a forward may begin, with hooks on them.
    """

    def __init__(self, planner: Planner, store: LayerStore, entrances: Sequence[nn.Module]):
        super().__init__(planner.sizes, store, planner.facts)
        self.planner = planner
        self.entrances = tuple(weakref.ref(module) for module in entrances)
        self.call: Call | None = None
        self.coordinates = Coordinates()
        self.offered_to_compiler, self.switch_to_graph = False, cast("Any", None)  # of the call (generation/compiled/)
        self._fixed = FixedSteps(store, planner.facts, entrances[0])
        self._ahead = StepsAhead(planner, store, self.leaving)

    def __getstate__(self) -> dict[str, Any]:
        """A copy takes no part in the call."""
        return {**vars(self), "call": None, "switch_to_graph": None}

    def is_bound_to(self, module: nn.Module) -> bool:
        """Whether this is the model of the cache, or its decoder."""
        return any(entrance() is module for entrance in self.entrances)

    def begin(
        self,
        module: nn.Module,
        inputs: torch.Tensor,
        attention_mask: Any,
        *,
        fixed: bool,
        outside_the_call: bool = False,
    ) -> dict[str, torch.Tensor | None]:
        """Begin a forward: make room, set the clock back where that is due, and show the sinks.

        Args:
            module: the model or its decoder, which is called.
            inputs: token ids [rows, columns] or embeddings [rows, columns, hidden].
            attention_mask: None, or [rows, columns ever fed + columns], 1 for real tokens.
            fixed: at fixed shapes and addresses (`can_be_fixed_now`), unless a row brings no token.
            outside_the_call: see `Forward`.

        Returns:
            What the model receives in place of its arguments.

        Raises:
            CacheStateError: what `Planner.plan` raises; a forward is in progress; or old tokens were lost.
        """
        self.check_between_forwards("fed", called=module)
        self.forward.check_whole()
        step: Step | None = None
        if inputs.shape[1] == 1:
            attention_mask = None if self._is_generated() else attention_mask
            plain = attention_mask is None and not (fixed or self.recording)
            step = self._ahead.taken(self.rows, inputs) if plain else None
        if step is None:
            step = self._planned_step(inputs, attention_mask, fixed=fixed)
        else:
            self.history.note(inputs, [1] * len(step.plans))
        self.store.sinks.show(step.sink_turn)
        self.forward.begin(module, step, outside_the_call=outside_the_call)
        return step.replaced if isinstance(step, StepAhead) else replaced_inputs(step, self.facts, attention_mask)

    def _planned_step(self, inputs: torch.Tensor, attention_mask: Any, *, fixed: bool) -> Step:
        """The step of a forward, with room for it."""
        columns, device = inputs.shape[1], inputs.device
        plans = self._planned(inputs, attention_mask)
        self.history.note(inputs, [plan.new for plan in plans])
        if self.recording:
            self._have_spare(columns)
        fixed = fixed and all(plan.new == 1 for plan in plans)
        if fixed and any(plan.dropped for plan in plans):  # then the window is not full, and some layers may need that
            fixed = self.can_be_fixed_now
        step = self._fixed.prepared(plans, device) if fixed else Step(plans, columns, self.store.kinds, device)
        self._set_clock(plans)
        return step

    def _planned(self, inputs: torch.Tensor, mask: Any) -> list[RowPlan]:
        """The plans of a forward; whole messages have left for it where they are to."""
        rows, columns = inputs.shape[:2]
        held = self.rows or [Row()] * rows
        self.leaving.check_ids(inputs)
        new = self.planner.new_tokens(held, self.columns, rows, columns, mask)
        recalled = max(columns, self.recalled) if self.recording else 0
        room = self.leaving.with_room(held, new, inputs, self.store.kinds, recalled=recalled)
        plans = self.planner.plan(room, new, self.columns, columns)
        if room is not held:
            self._let_leave(room)
        return plans

    def end(self, module: nn.Module, *, completed: bool) -> None:
        """The call of `module` has ended; with it the forward, if it began there.

        Raises:
            CacheStateError: it has stored nothing.
        """
        if not self.forward.ends_with(module):
            return
        # a call inside of it, of the same module, has failed: such as one that was refused for being inside
        if completed or not self.forward.is_running(called=module):
            self._end(completed=completed)

    def _is_generated(self) -> bool:
        """Whether the next token is of `generate`, and so real: to look at the mask would wait for the device."""
        return self.rows is not None and self.call is not None and self.call.is_past_prompt(self.columns)

    def run_outside(
        self, module: nn.Module, inputs: torch.Tensor, mask: Any, run: Callable[[dict[str, Any]], Any]
    ) -> Any:
        """A forward of one token that no hook begins or ends. `run` is given what the model receives."""
        completed, other = False, self.forward.step
        try:
            try:
                output = run(self.begin(module, inputs, mask, fixed=True, outside_the_call=True))
                completed = True
            finally:
                if self.forward.step is not other:
                    self._end(completed=completed)
        finally:  # again, as Ctrl-C may have fallen on the beginning of the first
            if self.forward.step is not other:
                self._give_up()
        return output

    def _end(self, *, completed: bool) -> None:
        step, phase = self.forward.step, self.forward.phase
        if step is None or not completed:
            self._give_up()
            return
        if self.store.kinds and phase is Phase.PLANNED:
            self.forward.done()
            raise CacheStateError(
                "This forward has stored nothing in the cache that it was given (a model that trains with gradient "
                "checkpointing does not). Call model.eval() first."
            )
        rows = step.rows_after if isinstance(step, StepAhead) else self._rows_after(step)
        try:
            rows = self.coordinates.told(rows, step.plans, self.sizes, self.planner.horizon)
        except UnsupportedGenerationError:
            self._give_up()  # what it has overwritten is lost
            raise
        # where this is interrupted, rows, keys and history would say different things
        self.forward.break_off("A forward with this cache was interrupted as it ended.")
        self.rows, self.columns = rows, self.columns + step.columns
        self._ahead.left = rows
        self.history.commit()
        self.forward.done()

    def _rows_after(self, step: Step) -> list[Row]:
        held = zip(self.rows or [Row()] * len(step.plans), step.plans, strict=True)
        return [row.after(plan.new, self.store.slots) for row, plan in held]

    @property
    def counts_positions(self) -> bool:
        """Whether the model takes positions at all (ALiBi and states do not)."""
        return self.facts.position_source == "position_ids" and bool(self.store.kinds)

    @property
    def can_be_fixed(self) -> bool:
        """Whether single tokens may go through a graph that is compiled once."""
        return self._fixed.are_possible

    @property
    def can_be_fixed_now(self) -> bool:
        """Whether the next one may."""
        return self.can_be_fixed and not self.recording and self.rows is not None and self._fixed.can_follow(self.rows)
