"""One forward of a `SinkCache`, from beginning to end, as the hooks (seam.py) and the graph (graph.py) drive it."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from typing import Any

import torch
from torch import nn

from sink_patch.compat import installed_shim
from sink_patch.errors import UnboundCacheError
from sink_patch.models.examine import ModelFacts
from sink_patch.streaming import hooks as seam
from sink_patch.streaming.steps import Step
from sink_patch.streaming.streams import Streams


class Forwards(seam.Streaming):
    """The part of `SinkCache` that knows which forward is under way, and what its model is to receive."""

    window_length: int
    num_sink_tokens: int
    _facts: ModelFacts | None
    _streams: Streams | None

    @abstractmethod
    def is_bound_to(self, model: nn.Module) -> bool:
        """Whether the cache belongs to this model."""

    def _rest(self) -> None:
        """No forward is under way."""
        self.fed_ahead: seam.FedAhead | None = None  # see prefill.py
        self.prompt_columns: int | None = None  # while `generate` decodes: single tokens after them are never padding
        self.says_compileable = False  # see graph.py
        self.begun_ahead = False  # see graph.py
        self._passes_cache_position = installed_shim().passes_cache_position
        self._entered: weakref.ref[nn.Module] | None = None  # the module that began the forward under way

    def begin_forward(
        self, module: nn.Module, inputs: torch.Tensor, attention_mask: Any, *, fixed: bool = False
    ) -> dict[str, torch.Tensor | None] | None:
        """Make room, set the clock, and say what the model is to receive.

        Args:
            inputs: token ids [rows, columns] or embeddings [rows, columns, hidden].
            attention_mask: None, or [rows, columns ever fed + columns], 1 for real tokens.
            fixed: at fixed shapes and addresses, for a graph that is compiled once.

        Returns:
            `position_ids`, `attention_mask` and, where this transformers has it, `cache_position` for the model; or
            None where an outer module has begun this forward.
        """
        if self._streams is None or self._facts is None or not self.is_bound_to(module):
            raise self._not_bound_to(type(module).__name__)
        if self.begun_ahead or self._is_inside(module, columns=inputs.shape[1]):
            return None
        generated = self.prompt_columns is not None and self._streams.columns >= self.prompt_columns
        step = self._streams.begin(inputs, attention_mask, fixed=fixed, all_real=generated)
        self._entered = weakref.ref(module)
        if not self._streams.kinds:  # states alone: what is padding in this forward is all that matters
            own = attention_mask is None or step.columns == 1
            return {"attention_mask": None if own else attention_mask[:, -step.columns :]}
        mask = step.attention_mask(explicit=self._facts.explicit_mask)
        coordinates = {"cache_position": step.mask_coordinates()} if self._passes_cache_position else {}
        positions = {"position_ids": step.position_ids()} if self._facts.position_source == "position_ids" else {}
        return {"attention_mask": mask, **positions, **coordinates}

    def _is_inside(self, module: nn.Module, columns: int) -> bool:
        """Whether `module` is a part of the one that has begun this forward (and not of one that was interrupted)."""
        step = None if self._streams is None else self._streams.step
        outer = None if self._entered is None else self._entered()
        if step is None or step.columns != columns or outer in (None, module):
            return False
        return (step.is_fixed or not step.touched) and self._is_running()

    def end_forward(self, module: nn.Module, *, completed: bool) -> None:
        if self._streams is None or not self.was_begun_by(module):
            return
        self._entered = None
        if completed:
            self._streams.commit()
        else:
            self._streams.abandon()

    def has_begun(self, module: nn.Module) -> bool:
        if self.begun_ahead:
            return True
        return self._streams is not None and self._streams.step is not None and not self.was_begun_by(module)

    def was_begun_by(self, module: nn.Module) -> bool:
        return not self.begun_ahead and self._entered is not None and self._entered() is module

    def _is_running(self) -> bool:
        """Whether the forward under way is not one that was interrupted."""
        return (
            torch.compiler.is_dynamo_compiling()
            or self.begun_ahead
            or seam.is_running(None if self._entered is None else self._entered())
        )

    @property
    def is_compileable(self) -> bool:
        """Whether a graph of the model may be compiled with it: where `generate` asks that, and in the graph itself."""
        if self._streams is not None and self._streams.step is not None:
            return self._streams.step.is_fixed
        return self.says_compileable and self._facts_can_be_fixed

    @property
    def can_be_fixed_now(self) -> bool:
        """Whether the next token may go through such a graph."""
        return self._facts_can_be_fixed and self._streams is not None and self._streams.can_be_fixed_now

    @property
    def _facts_can_be_fixed(self) -> bool:
        return (
            self._facts is not None
            and self._facts.position_source == "position_ids"
            and self._streams is not None
            and self._streams.can_be_fixed
        )

    def _current_step(self) -> Step:
        if self._streams is None or self._streams.step is None:
            raise self._not_bound_to("model")
        return self._streams.step

    def _not_bound_to(self, caller: str) -> UnboundCacheError:
        if self._facts is None:
            return UnboundCacheError.never(caller, self.window_length, self.num_sink_tokens)
        return UnboundCacheError.elsewhere(repr(self), caller)
