"""The one record of the forward that is in progress over a cache."""

from __future__ import annotations

import contextlib
import enum
import sys
import threading
import weakref
from collections.abc import Iterator
from types import FrameType

import torch
from torch import nn

from sink_patch.errors import CacheStateError
from sink_patch.streaming.fixed.step import FixedStep
from sink_patch.streaming.steps.step import Step


class Phase(enum.Enum):
    """How far a forward has come."""

    DONE = "done"
    """None is in progress: the cache may be fed, cropped, copied, saved."""
    PLANNED = "planned"
    """It has been planned, and no layer has stored anything."""
    STORING = "storing"
    """Layers have begun to store."""
    BROKEN = "broken"
    """Something failed half-way and old tokens are lost; only a reset helps."""


_DONE, _PLANNED, _STORING, _BROKEN = Phase  # by name they would be slow to reach, and each layer does


class Forward:
    """The forward in progress: its module, its step, who began it, and how far it has come.

    Each cache has one such object, and nothing else knows: hooks, compiled decoding and the rows ask it.

        DONE ── begin ──> PLANNED ── step_to_store ──> STORING ── end ──> DONE
                             │                            │
                             └────── give_up ─────────────┴──> DONE, or BROKEN where old tokens were overwritten
        BROKEN ── reset ──> DONE

    A plain forward, `model(token, past_key_values=cache)`: the hook before the model's forward begins it with the model
    as its module; the hook before the decoder's, which runs inside, finds that it `includes` the decoder and does
    nothing; the hook after the decoder's finds that it does not end there (`ends_with`); the one after the model's
    does, and ends it. If a layer raises, the same hook gives it up. After Ctrl-C no hook runs: `is_running` then finds
    that the call is no longer on the stack, and whoever comes next gives it up.

    A compiled forward is begun before the call of the graph and ended after it (`outside_the_call`): all hooks do
    nothing.
    """

    def __init__(self) -> None:
        self.phase = _DONE
        self.step: Step | None = None
        self.reason = ""  # why it is broken
        self.is_fixed = False  # whether its shapes and addresses are those of a graph
        self.outside_the_call = False
        self.position_ids: torch.Tensor | None = None  # which were made for it, until its module has handed them on
        self._module: weakref.ref[nn.Module] | None = None
        self._thread = 0

    @property
    def in_progress(self) -> bool:
        return self.step is not None

    def begin(self, module: nn.Module, step: Step, *, outside_the_call: bool = False) -> None:
        """A forward of `module` is planned.

        Args:
            outside_the_call: whether it is begun and ended around the call of the module, not by its hooks.
        """
        self._module, self.step, self.outside_the_call = weakref.ref(module), step, outside_the_call
        self.is_fixed = isinstance(step, FixedStep)
        # what a graph stores is not seen from here
        self.phase = _STORING if self.is_fixed else _PLANNED
        self._thread = threading.get_ident()

    def step_to_store(self) -> Step | None:
        """The step, for a layer that is about to store; None: no forward is in progress."""
        if self.phase is _PLANNED:
            self.phase = _STORING
        return self.step

    def done(self) -> None:
        """It has ended, or was given up and has done no harm."""
        self._leave(_DONE)

    def break_off(self, reason: str) -> None:
        """It was given up, and old tokens are lost. `reason` is a sentence for the user."""
        self._leave(_BROKEN)
        self.reason = reason

    @contextlib.contextmanager
    def broken_unless_finished(self, reason: str) -> Iterator[None]:
        """Inside, the keys of all layers are being changed; if that is interrupted, the cache is broken."""
        before = self.phase, self.reason
        self.phase, self.reason = _BROKEN, reason
        yield
        self.phase, self.reason = before

    def check_whole(self, refused: str = "") -> None:
        """Raise where old tokens are lost.

        Args:
            refused: a sentence for people that says what cannot be done.

        Raises:
            CacheStateError: the cache is broken.
        """
        if self.phase is _BROKEN:
            raise CacheStateError(
                f"{refused}{self.reason} Call reset() and feed the text again, or use a new SinkCache."
            )

    def includes(self, module: nn.Module, columns: int, position_ids: torch.Tensor | None = None) -> bool:
        """Whether a call of `module` with so many columns is a part of this forward, begun where it was called.

        Args:
            position_ids: which it is given. Those that were made for this forward come to it but once, and no look at
                the stack is needed then. (Who has kept them, and calls again after an interrupt, is not in it.)
        """
        if self.outside_the_call:
            return True
        if self.step is None or self.step.columns != columns or self._begun_by() in (None, module):
            return False
        if not (self.is_fixed or self.phase is _PLANNED):
            return False
        if position_ids is not None and position_ids is self.position_ids:
            self.position_ids = None
            return True
        return self.is_running()

    def ends_with(self, module: nn.Module) -> bool:
        """Whether the forward ends when the call of `module` does, as it began there."""
        return self.step is not None and not self.outside_the_call and self._begun_by() is module

    def has_begun_before(self, module: nn.Module) -> bool:
        """Whether what `module` is called for in a graph was begun before (and not in a call of it that broke off)."""
        return self.outside_the_call or (self.step is not None and not self.ends_with(module))

    def is_running(self, called: nn.Module | None = None) -> bool:
        """Whether the call that began it is still under way, and was not interrupted.

        Args:
            called: a module that is just being called anew; that call is not meant.
        """
        module = self._begun_by()
        if self.step is None or module is None:
            return False
        if self.outside_the_call or torch.compiler.is_dynamo_compiling():
            return True
        return _calls_on_the_stack(module, self._thread, enough=1 + (called is module)) > (called is module)

    def _begun_by(self) -> nn.Module | None:
        return None if self._module is None else self._module()

    def _leave(self, phase: Phase) -> None:
        self.phase, self.step, self._module, self.position_ids = phase, None, None, None
        self.is_fixed = self.outside_the_call = False


def _calls_on_the_stack(module: nn.Module, thread: int, enough: int) -> int:
    """How many calls of a module are under way in a thread, counted up to `enough`.

    An interrupt goes past all hooks of torch (nn/modules/module.py, `_call_impl`), so that none of them can tell.
    """
    own = thread == threading.get_ident()
    frame: FrameType | None = sys._getframe(1) if own else sys._current_frames().get(thread)
    count = 0
    while frame is not None and count < enough:
        count += frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is module
        frame = frame.f_back
    return count
