"""The rows of a cache as streams: what each has seen, where its clock stands, and the forward under way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from sink_patch.buffers.layers import SinkLayer
from sink_patch.buffers.rotation import Turn
from sink_patch.buffers.sinks import Sinks
from sink_patch.errors import CacheStateError, SinkArgumentError
from sink_patch.models.families.family import OneByOne
from sink_patch.models.positions import Context
from sink_patch.rules.kinds import LayerKind
from sink_patch.rules.padding import new_tokens
from sink_patch.rules.plans import RowPlan, plan_row
from sink_patch.rules.rows import Row, Slots
from sink_patch.streaming.fixed_steps import FixedStep
from sink_patch.streaming.steps import Step

_SPARE_AT_ONCE = 16


class Streams:
    """State of all rows between forwards, and the `step` during one.

    Args:
        window_length, num_sink_tokens: of the cache.
        context: how far the model's positions reach.
        horizon: RoPE position at which a row's clock is set back.
        layers: those of the cache; the rings of ours are turned when that happens.
        stateful: whether some layers hold a recurrent state, which cannot be taken back.
        one_by_one: why several tokens cannot follow others in one forward; None: they can.
    """

    def __init__(
        self,
        window_length: int,
        num_sink_tokens: int,
        context: Context,
        horizon: int,
        layers: Sequence[Any],
        *,
        stateful: bool,
        one_by_one: OneByOne | None,
    ):
        self.stateful, self.one_by_one = stateful, one_by_one
        self.sizes = (window_length, num_sink_tokens, horizon)
        self.context = context
        self.layers = layers
        self._sink_layers = [layer for layer in layers if isinstance(layer, SinkLayer)]
        self._other_layers = [layer for layer in layers if not isinstance(layer, SinkLayer)]
        self._sinks = Sinks([ring for layer in self._sink_layers for ring in layer.rings if ring.has_turning_sinks])
        self._see_kinds()
        self.recording = False  # whether what leaves the window must be able to come back
        self.rows: list[Row] | None = None  # None: nothing fed yet
        self.columns = 0  # fed so far, padding counted in
        self.step: Step | None = None
        self._fixed: FixedStep | None = None  # used again and again
        self.broken: str | None = None  # why the rings cannot be trusted any more

    def begin(self, inputs: torch.Tensor, attention_mask: Any, *, fixed: bool = False, all_real: bool = False) -> Step:
        """Plan a forward of `inputs` [rows, columns, ...]; the clock is set back first where that is due.

        Args:
            inputs, attention_mask: as in `SinkCache.begin_forward`.
            fixed: plan it at fixed shapes and addresses, which must be possible (`can_be_fixed_now`); it is not where a
                row brings no token.
            all_real: whether a single token is real, whatever the mask says: to look would wait for the device.

        Raises:
            CacheStateError: another batch size, more positions than there are, or rings spoilt by a failed forward.
            SinkArgumentError: a mask that does not fit.
        """
        self._settle()
        known = all_real and inputs.shape[1] == 1 and self.rows is not None
        plans = self._plan(inputs.shape[0], inputs.shape[1], None if known else attention_mask)
        if self.recording:
            self._spare(inputs.shape[1])
        fixed = fixed and all(plan.new == 1 for plan in plans)
        step = self._fix(plans, inputs.device) if fixed else Step(plans, inputs.shape[1], self.kinds, inputs.device)
        self._set_clock(step)
        self._sinks.show(step)
        self.step = step
        return step

    def _settle(self) -> None:
        """Forget a forward that ended in an interrupt, past all hooks.

        Raises:
            CacheStateError: the rings are spoilt.
        """
        self.abandon()
        if self.broken is not None:
            raise CacheStateError(f"{self.broken} Call reset() and feed the text again, or use a new SinkCache.")

    @property
    def can_be_fixed(self) -> bool:
        """Whether single tokens may go through a graph that is compiled once."""
        return FixedStep.is_possible(self.kinds) and not self.stateful

    @property
    def can_be_fixed_now(self) -> bool:
        """Whether the next one may."""
        if not self.can_be_fixed or self.recording or self.rows is None:
            return False
        if not FixedStep.is_ready(self.kinds, [row.seen for row in self.rows]):
            return False
        if self._fixed is not None and self._fixed.knows(self._sink_layers):
            return True
        return len({layer.keys.device for layer in self._sink_layers if layer.keys is not None}) == 1

    def _fix(self, plans: Sequence[RowPlan], device: torch.device) -> FixedStep:
        if self._fixed is None or not self._fixed.knows(self._sink_layers):
            self._fixed = None  # what it holds would be there twice
            for layer in self._sink_layers:
                layer.fix()
            self._sinks.bring_together()
            self._fixed = FixedStep(self.kinds, len(plans), device, self._sink_layers)
        self._fixed.prepare(plans)
        return self._fixed

    def commit(self) -> None:
        """What the forward has stored counts as seen.

        Raises:
            CacheStateError: it has stored nothing.
        """
        step, self.step = self.step, None
        if step is None:
            return
        if self.kinds and not step.touched:
            raise CacheStateError(
                "This forward has stored nothing in the cache that it was given (a model that trains with gradient "
                "checkpointing does not). Call model.eval() first."
            )
        rows = self.rows or [Row()] * len(step.plans)
        self.rows = [row.after(plan.new, self._slots) for row, plan in zip(rows, step.plans, strict=True)]
        self.columns += step.columns

    def abandon(self) -> None:
        """Forget a forward that did not end. Tokens that it overwrote are lost."""
        step, self.step = self.step, None
        if step is None:
            return
        if self.rows is None:  # the first one: nothing of it need stay
            self.reset()
            return
        self.rows = [row.spoilt(plan.new, self._slots) for row, plan in zip(self.rows, step.plans, strict=True)]
        overwritten = step.touched and any(kind.evicts(row) for kind in self.kinds for row in step.plans)
        if overwritten or self.stateful:
            self.broken = "A forward with this cache failed half-way, after it had overwritten old tokens."

    def reset(self) -> None:
        """Forget all tokens."""
        for layer in self.layers:
            layer.reset()
        for layer in self._sink_layers:  # some may have been laid out anew, and others not
            layer.lay_out(replace(layer.kind, spare=self._slots.spare), ())
        self._see_kinds()
        self.forget_buffers()
        self.rows, self.columns, self.step, self.broken = None, 0, None, None

    def select_rows(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, in that order; a boolean mask over the rows will do too."""
        self.abandon()
        if self.rows is None:
            return
        self.forget_buffers()
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        for layer in self._sink_layers:
            layer.select_rows(indices)
        for layer in self._other_layers:
            layer.reorder_cache(indices)
        alike = all(row == self.rows[0] for row in self.rows)  # then there is no need to ask the device
        self.rows = [self.rows[0 if alike else row] for row in (range(len(indices)) if alike else indices.tolist())]

    def crop(self, count: int) -> bool:
        """Forget the newest `count` tokens of each row; False if tokens that would have to come back are gone."""
        self._settle()
        if count == 0 or self.rows is None:
            return True
        if self.stateful or count < 0 or not all(row.can_lose(count) for row in self.rows):
            return False
        window_length, _, _ = self.sizes
        self._move_clock([row.without(count, window_length) for row in self.rows])
        self.columns -= count
        return True

    def record(self, tokens: int) -> None:
        """From now on keep what leaves the window for the newest `tokens` tokens, and for those of any one forward."""
        self._settle()
        self.recording = True
        self._spare(tokens)

    def stop_recording(self) -> None:
        """Give the room for that back."""
        self.abandon()
        self.recording = False
        self._lay_out(0)

    def _spare(self, tokens: int) -> None:
        """Have so many spare slots, and some more, as each change of their number copies the cache."""
        if tokens > self._slots.spare:
            self._lay_out(-(-tokens // _SPARE_AT_ONCE) * _SPARE_AT_ONCE)

    def _lay_out(self, spare: int) -> None:
        if all(kind.spare == spare for kind in self.kinds):
            return
        before, self.broken = self.broken, "The slots of this cache could not be laid out anew to the end."
        self.forget_buffers()
        for layer in self._sink_layers:
            layer.lay_out(replace(layer.kind, spare=spare), [row.seen for row in self.rows or ()])
        self._see_kinds()
        self.rows = None if self.rows is None else [row.spoilt(0, self._slots) for row in self.rows]
        self.broken = before

    def forget_buffers(self) -> None:
        """Keep none alive that the layers are about to give up."""
        self._fixed = None
        self._sinks.forget()

    def _see_kinds(self) -> None:
        self.kinds: list[LayerKind] = list(dict.fromkeys(layer.kind for layer in self._sink_layers))
        for layer in self._sink_layers:
            layer.kind_index = self.kinds.index(layer.kind)
        self._slots = Slots(
            min((kind.slots for kind in self.kinds), default=0), min((kind.spare for kind in self.kinds), default=0)
        )

    def positions_needed(self, columns: int) -> int:
        """RoPE positions that a forward of so many tokens takes up, however the clock is set."""
        window_length, num_sink_tokens, _ = self.sizes
        if columns <= window_length - num_sink_tokens:
            return window_length
        return columns + min(num_sink_tokens, max((row.seen for row in self.rows or ()), default=0))

    def _plan(self, rows: int, columns: int, attention_mask: Any) -> list[RowPlan]:
        held = self.rows if self.rows is not None else [Row()] * rows
        if len(held) != rows:
            raise CacheStateError(
                f"The cache holds {len(held)} rows, but {rows} were fed. Use a new SinkCache for another batch size."
            )
        new = new_tokens(attention_mask, [row.seen for row in held], self.columns, columns)
        if columns == 0:
            raise SinkArgumentError("A forward of no tokens was asked for. Pass the new tokens of the stream.")
        if self.stateful and any(row.seen and count != columns for row, count in zip(held, new, strict=True)):
            raise CacheStateError(
                "Padding in the middle of a stream would enter the recurrent state of this model. Feed rows of one "
                "length, or the new tokens of each row by themselves."
            )
        made = {key: plan_row(*key, *self.sizes) for key in set(zip(held, new, strict=True))}
        plans = [made[key] for key in zip(held, new, strict=True)]
        self._check_positions(plan.first_position + plan.new for plan in plans)
        self._check_one_by_one(plans, columns)
        return plans

    def _check_one_by_one(self, plans: Iterable[RowPlan], columns: int) -> None:
        if self.one_by_one is None or not self.columns or columns == 1:
            return
        if max(plan.past for plan in plans) + columns > self.one_by_one.beyond:
            raise CacheStateError(
                f"{self.one_by_one.reason}, and {columns} were fed after others. Feed them one by one, or the whole "
                "text to a new cache."
            )

    def _check_positions(self, needed: Iterable[int]) -> None:
        """Only a forward longer than the context can need more positions than the horizon leaves."""
        limit = self.context.limit
        if limit is not None and (most := max(needed)) > limit:
            window_length, num_sink_tokens, _ = self.sizes
            raise CacheStateError(
                f"This forward needs {most} positions, and the model may use {limit}, as {self.context.why_limited}. "
                f"Feed the text in pieces of {window_length - num_sink_tokens} tokens or fewer (prefill_chunk_size in "
                "generate)."
            )

    def _set_clock(self, step: Step) -> None:
        """Turn all rings back where the newest position would reach the horizon."""
        if self.rows is not None and any(plan.turn for plan in step.plans):
            self._move_clock([replace(row, base=plan.base) for row, plan in zip(self.rows, step.plans, strict=True)])

    def _move_clock(self, moved: list[Row]) -> None:
        """Turn all rings by as much as the base of their row moves."""
        turn = Turn([row.base - new.base for row, new in zip(self.rows or (), moved, strict=True)])
        if any(turn.rows):
            self.broken = "The clock of this cache could not be set to the end."
            for layer in self._sink_layers:
                layer.turn(turn)
            self.broken = None
        self.rows = moved
