"""Whether the next token can go through a graph that is compiled once, and the step for it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sink_patch.buffers.store import LayerStore
from sink_patch.models.entries import text_config
from sink_patch.models.facts import ModelFacts
from sink_patch.rules.plans import RowPlan
from sink_patch.rules.rows import Row
from sink_patch.streaming.fixed.graphs import is_sharded
from sink_patch.streaming.fixed.step import FixedStep

_READ_BY_COORDINATE = ("eager", "sdpa")


class FixedSteps:
    """Gives the fixed step of a cache, the same one as long as its layers stay where they are.

    Args:
        store: the layers of the cache.
        facts: of the model.
        model: the model.
    """

    def __init__(self, store: LayerStore, facts: ModelFacts, model: nn.Module):
        self._store, self._facts = store, facts
        self._config = weakref.ref(text_config(model))  # which the layers read, too; found once, as that takes time
        self._is_sharded = is_sharded(model)
        self._step: FixedStep | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy lies elsewhere, and makes a step of its own."""
        return {**vars(self), "_step": None}

    @property
    def are_possible(self) -> bool:
        """Whether the model is one graph and takes positions, and its layers are read at fixed shapes in any order."""
        return self._facts.why_no_graph is None and not self._is_sharded

    def can_follow(self, rows: Sequence[Row]) -> bool:
        """Whether the next tokens of these rows can be read so: all their sinks are in, nothing unseen is held.

        All layers must lie on one device where the step is still to be made.
        """
        kinds = self._store.kinds
        full = len(kinds) > 1 and not self._side_by_side
        enough = [kind.capacity if full else kind.num_sink_tokens for kind in kinds]
        are_in = all(kind.count(row) >= count for kind, count in zip(kinds, enough, strict=True) for row in rows)
        if not are_in or any(kind.spare for kind in kinds):
            return False
        return self._held() is not None or len(self._store.devices()) == 1

    def prepared(self, plans: Sequence[RowPlan], device: torch.device) -> FixedStep:
        """The step, for a forward of these plans."""
        step, side_by_side = self._held(), self._side_by_side
        if step is None or step.side_by_side != side_by_side:
            self._step = None  # what it holds would be there twice
            self._store.take_all_slots()
            step = self._step = FixedStep(self._store, len(plans), device, side_by_side=side_by_side)
        step.prepare(plans)
        return step

    @property
    def _side_by_side(self) -> bool:
        """Whether each kind of layers may have columns of its own in the mask.

        Its attention must read the mask where the cache says (flash attention reads its last columns), and there must
        be but one sliding window.
        """
        if len(self._store.kinds) == 1 or len(self._facts.sliding_windows) > 1:
            return False
        return getattr(self._config(), "_attn_implementation", None) in _READ_BY_COORDINATE

    def _held(self) -> FixedStep | None:
        return self._step if self._step is not None and self._step.is_of(self._store.sink_layers) else None
