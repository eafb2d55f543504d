"""Calls that nobody has asked to compile: plain at first, and through a graph from when that pays.

To compile takes as long as to decode some thousand tokens, and the graph serves all later calls of its sizes. So a call
switches at once where there is a graph, soon where it is long, and else once all calls have decoded as many tokens as
are worth a graph.
"""

from __future__ import annotations

import importlib.util
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping
from math import inf
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from sink_patch.buffers.layers import attributes_of
from sink_patch.cache.packing import tensors_in
from sink_patch.cache.sink_cache import SinkCache
from sink_patch.compat import why_not_traced
from sink_patch.errors import SinkPatchWarning
from sink_patch.models.probe.calls import is_compiled
from sink_patch.streaming.bound import streams_of

WORTH = 2048  # tokens; of calls that are long by themselves, and of all calls of one size together
SOON = 64  # tokens of a long call before it switches, as many end early

_Decoded = dict[tuple[int, int, int], float]  # tokens, by rows, window_length and num_sink_tokens
_decoded: WeakKeyDictionary[nn.Module, _Decoded] = WeakKeyDictionary()


class SwitchToGraph:
    """When the tokens of one call switch from plain forwards to the graph.

    Args:
        decoded: tokens of the model that were decoded plainly, by sizes; infinitely many: there is a graph. Below zero:
            it could not be made.
        cache: of the call.
        is_long: whether the call asks for as many tokens as are worth a graph.
    """

    def __init__(self, decoded: _Decoded, cache: SinkCache, *, is_long: bool):
        self._decoded, self._cache = decoded, weakref.ref(cache)
        self._window = (cache.window_length, cache.num_sink_tokens)
        self._is_long, self._plain = is_long, 0

    def is_due(self, rows: int) -> bool:
        """Whether the next token of so many rows goes through the graph; it is counted if not."""
        sizes = (rows, *self._window)
        so_far = self._decoded.get(sizes, 0)
        if not _is_in_main_thread():  # text without end may be read in any
            return False
        if so_far >= WORTH or (self._is_long and self._plain >= SOON and so_far > 0):
            return True
        self._plain += 1
        self._decoded[sizes] = so_far + 1
        return False

    def through(self, model: nn.Module, compiled: Callable[..., Any], rows: int, inputs: Mapping[str, Any]) -> Any:
        """The forward; without a graph, now and later, if torch cannot make one.

        A forward that could not be compiled may run again over the same step: it stores the same keys at the same
        places, and recurrent states are put back. Whatever else fails is raised, and later calls do without a graph.

        Raises:
            TorchDynamoException: a graph was there, and torch could not make another for states that have changed.
        """
        sizes = (rows, *self._window)
        is_made = self._decoded[sizes] == inf
        before = [] if is_made else [(state, state.clone()) for state in self._states()]
        try:
            output = compiled(**inputs)
        except Exception as error:
            self._decoded[sizes] = -inf
            if not isinstance(error, torch._dynamo.exc.TorchDynamoException) or (is_made and self._states()):
                raise
            for state, was in before:
                state.copy_(was)
            reason = " ".join(str(error).split("\n")[:2])
            warnings.warn(
                f"{type(model).__name__} decodes without a graph, about as fast as with a DynamicCache, as torch could "
                f"not compile it ({reason}). Pass disable_compile=True to generate, or compile_config=CompileConfig() "
                "to see the whole error.",
                SinkPatchWarning,
                stacklevel=2,
            )
            return model(**inputs)
        self._decoded[sizes] = inf
        return output

    def _states(self) -> list[torch.Tensor]:
        """The recurrent states of the cache."""
        cache = self._cache()
        layers = () if cache is None else cache.layers
        return [state for layer in layers for state in tensors_in(attributes_of(layer))]


def switch_to_graph(model: nn.Module, cache: SinkCache, generation_config: Any) -> SwitchToGraph | None:
    """How a call switches to a graph that it does not ask for; None: it stays plain.

    It stays plain in other threads than the main one, where older versions of torch cannot replay CUDA graphs; where
    the user has compiled the model, or several processes or devices share it; where beams give the cache other buffers
    after each token, or what the model returns beside logits is kept, which the next run of a CUDA graph overwrites;
    and where torch cannot compile here. What nobody has asked for must not fail.

    Args:
        model: of the call.
        cache: of the call, which has not read the prompt yet.
    """
    if not _is_in_main_thread() or is_compiled(model) or is_shared(model):
        return None
    config = generation_config
    if (config.num_beams or 1) > 1 or config.output_attentions or config.output_hidden_states:
        return None
    if not can_compile_for(model):
        return None
    call = streams_of(cache).call  # text without end has none
    is_long = config.max_length - (call.columns.given if call else 0) >= WORTH
    return SwitchToGraph(_decoded.setdefault(model, {}), cache, is_long=is_long)


def _is_in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def is_shared(model: nn.Module) -> bool:
    """Whether several processes or devices share the model."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return distributed or len(set(getattr(model, "hf_device_map", {}).values())) > 1


def can_compile_for(model: Any) -> bool:
    """Whether torch has what it needs to compile for the device of the model."""
    is_there = model.device.type not in ("cuda", "xpu") or importlib.util.find_spec("triton") is not None
    return is_there and why_not_traced() is None
