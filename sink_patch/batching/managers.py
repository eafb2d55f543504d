"""A manager of continuous batching that serves with sinks.

Objects of ours stand before some methods of the objects of this one manager: other managers and models are as ever, and
this one goes on when transformers is unpatched.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from sink_patch.batching.batches import Batches, SinkInputs
from sink_patch.batching.pages import SinkPages
from sink_patch.batching.scheduling import SinkScheduling
from sink_patch.batching.service import Service
from sink_patch.batching.slots.blocks import Blocks
from sink_patch.batching.slots.kept import Slots
from sink_patch.batching.slots.readings import ModelNow
from sink_patch.batching.slots.room import SinkRoom
from sink_patch.compat import models as transformers_models
from sink_patch.models.entries import unwrapped

_NAME = "_sink_service"


def serve(manager: Any, service: Service) -> None:
    """Let a manager that has not begun serve with sinks."""
    config = manager.continuous_batching_config  # its own copy
    if config.safety_margin is None:
        config.safety_margin = 0.0  # no request needs more room later
    config.allow_block_sharing = manager._use_prefix_sharing = False
    config.max_blocks_per_request = 0  # the kernels that read block tables know no rings
    config.decode_compile_config = None
    setattr(manager, _NAME, service)
    transformers_models.stand_before(_Making(service, manager), manager, "_create_batch_processor")


def service_for(model: Any, passed: Any, arguments: Mapping[str, Any] | None = None) -> Service | None:
    """What `Service.asked_for` finds, and that it works, shown by a trial.

    Raises:
        SinkPatchError: what that raises; or the trial has failed.
    """
    service = Service.asked_for(model, passed, arguments)
    if service is not None:
        service.check_trial(model, serve)
    return service


def service_of(manager: Any) -> Service | None:
    """How a manager serves; None: as transformers does."""
    service: Service | None = vars(manager).get(_NAME)
    return service


class _Making:
    """Stands before a manager, which makes its processor when it begins, and keeps it from one session to the next."""

    def __init__(self, service: Service, manager: Any):
        self._service, self._manager = service, weakref.ref(manager)
        self._model = weakref.ref(unwrapped(manager.model))
        self._attention = manager.model.config._attn_implementation  # which the manager has set
        self._made: Callable[[], Any] = lambda: None  # a weak reference, as its end frees the pages

    def _create_batch_processor(self, wrapped: Any) -> Any:
        self._set_attention()
        processor = wrapped()
        if processor is not self._made():
            _take_over(processor, self._service, self._model)
            self._made = weakref.ref(processor)
        return processor

    def _set_attention(self) -> None:
        """The end of a session sets back what the model attends by, and transformers begins the next one so."""
        manager: Any = self._manager()
        before = manager.model.config._attn_implementation
        if before != self._attention:
            manager.model.set_attn_implementation(self._attention)
            manager._original_attn_impl = before


def _take_over(processor: Any, service: Service, model: Callable[[], nn.Module | None]) -> None:
    cache = processor.cache
    is_recorded = bool(processor.model_runner.pad_inputs)
    kinds = {name: service.groups[name].kind for name in cache.cache_allocators}
    pages = [
        SinkPages(allocator, kinds[name], is_recorded=is_recorded)
        for name, allocator in cache.cache_allocators.items()
        if not kinds[name].local
    ]
    blocks = Blocks(cache, processor.inputs_and_outputs.compute_stream)
    slots = Slots.of(service, blocks, ModelNow(model), cache.max_batch_tokens)
    SinkScheduling(processor, service, SinkRoom(cache, service, blocks, slots.kept), slots)
    SinkInputs(processor, Batches(service, cache.cache_allocators, pages))
