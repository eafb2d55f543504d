"""One batch from its plan to its end: positions within the window, clocks, sinks."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sink_patch.batching.pages import SinkPages
from sink_patch.batching.service import Service
from sink_patch.batching.slots.blocks import on_stream
from sink_patch.batching.slots.streams import stream_of
from sink_patch.batching.turning import Planned, Turner, turnings
from sink_patch.compat import models as transformers_models
from sink_patch.errors import UnsupportedModelError
from sink_patch.rules.plans import plan_row
from sink_patch.rules.rows import Row


class Batches:
    """The requests of a manager, batch by batch.

    Args:
        service: what is served.
        allocators: of its paged cache, by the name of their layers.
        pages: what stands before those with sinks.
    """

    def __init__(self, service: Service, allocators: Mapping[str, Any], pages: Sequence[SinkPages]):
        self._service, self._pages, groups = service, tuple(pages), service.groups
        self._turner = Turner([one for name, held in allocators.items() for one in turnings(held, groups[name])])
        self._next: list[Planned] = []
        self._is_proven = False

    def plan(self, requests: Sequence[Any]) -> None:
        """Before transformers prepares a batch of requests (`FutureRequestState`)."""
        sizes, clock = self._service.sizes, self._service.horizon
        self._next = []
        for one in requests:
            state, stream = one.state, stream_of(one.state)
            row = Row(state.position_offset, stream.base)
            plan = plan_row(row, one.query_length, sizes.window_length, sizes.num_sink_tokens, clock)
            self._next.append(Planned(state.request_id, stream, plan))
        for pages in self._pages:
            pages.begin(planned.plan for planned in self._next)

    def positions(self) -> torch.Tensor | None:
        """Those of all tokens of the batch, int32 [tokens]; None where they are as transformers counts them."""
        plans = [planned.plan for planned in self._next]
        if not any(plan.base for plan in plans):
            return None
        runs = [range(plan.first_position, plan.first_position + plan.new) for plan in plans]
        return torch.tensor([position for run in runs for position in run], dtype=torch.int32, device="cpu")

    def begin(self) -> None:
        """Turn what is to turn, just before the model runs, on the stream of the device on which that does."""
        batch, self._next = self._next, []
        self._turner.turn(batch)
        for planned in batch:
            planned.stream.base = planned.plan.base

    def check_stored(self) -> None:
        """After the first batch: each layer must have stored its keys where they were looked for.

        Raises:
            UnsupportedModelError: one has not.
        """
        if self._is_proven:
            return
        missing = [index for one in self._pages for index in one.missing]
        if missing:
            raise UnsupportedModelError(
                f"{self._service.facts.model_class} was served with sinks in continuous batching, and its layers "
                f"{missing} have stored nothing in the paged cache. Use generate, or serve without "
                "--continuous-batching."
            )
        self._is_proven = True


class SinkInputs:
    """Stands before the inputs of batches (`ContinuousBatchingIOs`), and before the processor that runs them."""

    def __init__(self, processor: Any, batches: Batches):
        self._batches, self._processor = batches, processor
        transformers_models.stand_before(self, processor, "_generation_step")
        for inputs in transformers_models.inputs_of(processor.inputs_and_outputs):
            prepare = functools.partial(self.prepare_batch_tensors, inputs, inputs.prepare_batch_tensors)
            inputs.prepare_batch_tensors = prepare

    def prepare_batch_tensors(
        self, inputs: Any, wrapped: Any, requests_in_batch: list[Any], *others: Any, **named: Any
    ) -> None:
        self._batches.plan(requests_in_batch)
        wrapped(requests_in_batch, *others, **named)
        positions = self._batches.positions()
        if positions is not None:
            inputs.position_ids[: len(positions)] = positions.to(inputs.position_ids.device)

    @torch.no_grad()
    def _generation_step(self, wrapped: Any, model: Any) -> None:
        with on_stream(self._processor.inputs_and_outputs.compute_stream):
            self._batches.begin()
        wrapped(model)
        self._batches.check_stored()
