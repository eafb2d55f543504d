"""The proof that continuous batching serves a model: two requests in pages say what a plain forward of each says.

Not every model of transformers hands on what its paged cache needs. Some fail there, and nothing of theirs tells.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from sink_patch.compat import models as transformers_models
from sink_patch.models.probe.calls import probe_tokens, run

_NUM_TOKENS = (6, 4)  # of the two requests; a batch has room for one token less than the first of them has
_FAR = 5e-5  # how far logits may be off, of their size; what is left out of attention may be as little as 1e-4
_FARTHER = 0.25  # in lower precision

State = tuple[Any, ...]
_passed: weakref.WeakKeyDictionary[nn.Module, frozenset[State]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()  # a trial may give the model another implementation of attention for a while


def fault(model: Any, serve: Callable[[Any], None]) -> str:
    """What keeps a model from being served by a manager; empty: nothing does.

    A model object that has passed is not tried again before its dtype, its attention or its device is another one.

    Args:
        serve: lets a manager that has not begun serve with sinks.
    """
    with _lock:
        state = (model.dtype, model.config._attn_implementation, model.device)
        passed = _passed.get(model, frozenset())
        if state in passed:
            return ""
        with _as_it_was(model):
            reason = _try(model, serve)
        if not reason:
            _passed[model] = passed | {state}
        return reason


@contextlib.contextmanager
def _as_it_was(model: Any) -> Iterator[None]:
    """Inside, a model is not in training; what its parts were, and random numbers, are as before in the end."""
    training = {module: module.training for module in model.modules()}
    on = [] if model.device.type in ("cpu", "meta") else [model.device]
    with torch.random.fork_rng(on, device_type=model.device.type if on else "cuda"):
        try:
            yield
        finally:
            for module, was in training.items():
                module.training = was


@torch.no_grad()
def _try(model: Any, serve: Callable[[Any], None]) -> str:
    model.eval()  # as its manager does
    tokens = probe_tokens(model, max(_NUM_TOKENS))[:, 0]  # [tokens]
    requests = {str(count): tokens[:count] for count in _NUM_TOKENS}
    plain = {name: run(model, ids[None], None).logits[0, -1] for name, ids in requests.items()}  # [vocabulary] each
    try:
        with _manager(model) as manager:
            serve(manager)
            paged = _paged(model, manager, {name: ids.tolist() for name, ids in requests.items()})
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as failure:  # whatever it is that a model does there
        return f"a trial of it fails ({type(failure).__name__}: {failure})"
    is_exact = model.dtype.itemsize >= 4 and torch.get_float32_matmul_precision() == "highest"
    far = _FAR if is_exact else _FARTHER
    off = [((paged[name] - one).float().norm() / one.float().norm()).item() for name, one in plain.items()]
    return "" if max(off) <= far else f"in a trial its logits are off by {max(off):.1e} of their size"


@contextlib.contextmanager
def _manager(model: Any) -> Iterator[Any]:
    """A small manager of a model, which has its own attention again in the end."""
    manager = transformers_models.small_manager(model, max(_NUM_TOKENS) - 1)
    try:
        yield manager
    finally:
        if manager._original_attn_impl is not None:
            model.set_attn_implementation(manager._original_attn_impl)


def _paged(model: Any, manager: Any, requests: Mapping[str, list[int]]) -> Mapping[str, torch.Tensor]:
    """The last logits of requests, [vocabulary] each, in batches of few tokens."""
    processor, found = manager._create_batch_processor(), dict[str, torch.Tensor]()
    for name, ids in requests.items():
        processor.scheduler.add_waiting_request(transformers_models.request(name, ids))
    while len(found) < len(requests) and processor.prepare_next_batch():
        logits = model(**processor.inputs_and_outputs.get_model_kwargs()).logits[0]  # [tokens, vocabulary]
        end = 0
        for one in processor.inputs_and_outputs.requests_in_batch:
            end += one.query_length
            if one.has_new_token:
                found[one.state.request_id] = logits[end - 1]
                processor.scheduler.finish_request(one.state.request_id)
    return found
