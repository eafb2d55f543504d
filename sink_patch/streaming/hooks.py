"""The one place where absolute coordinates become those of the cache: hooks around the model's forward.

Outside, everything is absolute and means what transformers means by it. The model's forward alone receives RoPE
positions (absolute - base) and a mask over the columns that it sees. The hooks hold no state; they do nothing unless
their cache is a sink cache. Both the model and its decoder get them, because some callers enter at the decoder
(PEFT calls the wrapped model's `forward`, past its hooks): the first hooked module that a forward reaches does the
work.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import nn

from sink_patch.errors import UnsupportedGenerationError
from sink_patch.models.entries import CACHE_NAMES, decoder_of

_OTHER_INPUTS = {
    *("pixel_values", "pixel_values_videos", "pixel_values_images", "input_features", "input_values"),
    *("audio_values", "mm_encoder_outputs"),
}
_installing = threading.Lock()


@dataclass(frozen=True)
class FedAhead:
    """Columns at the start of a forward that the cache holds already.

    Args:
        columns: how many.
        of_history: only where the forward brings all that its mask covers.
    """

    columns: int
    of_history: bool = False

    def cut(self, inputs: torch.Tensor, attention_mask: Any) -> torch.Tensor:
        """The rest of inputs [rows, columns, ...]."""
        whole = attention_mask is None or inputs.shape[1] == attention_mask.shape[-1]
        return inputs[:, self.columns :] if whole or not self.of_history else inputs


class Streaming(ABC):
    """What a cache must offer to be driven by the hooks."""

    fed_ahead: FedAhead | None
    """What is cut off at the start of the next forward."""

    @abstractmethod
    def has_begun(self, module: nn.Module) -> bool:
        """Whether what `module` is called for in a graph was begun before (and not in a call of it that broke off)."""

    @abstractmethod
    def was_begun_by(self, module: nn.Module) -> bool:
        """Whether the forward under way was begun where `module` was called, and ends with that call."""

    @property
    @abstractmethod
    def can_be_fixed_now(self) -> bool:
        """Whether the next token may be fed at fixed shapes and addresses."""

    @abstractmethod
    def begin_forward(
        self, module: nn.Module, inputs: torch.Tensor, attention_mask: Any, *, fixed: bool = False
    ) -> dict[str, Any] | None:
        """Prepare for a forward of `module`; returns the arguments to replace, or None if one is under way."""

    @abstractmethod
    def end_forward(self, module: nn.Module, *, completed: bool) -> None:
        """Take what the forward of `module` has stored as seen; does nothing if `module` did not begin it."""


def install(model: nn.Module) -> tuple[nn.Module, ...]:
    """Put the hooks on a model and its decoder, once; returns the hooked modules."""
    modules = entrances(model)
    with _installing:
        _set_apart()
        for module in modules:
            if _enter not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(_enter, with_kwargs=True)
            # may be missing alone: torch numbers hooks by process, so a new one may replace one that was unpickled
            if _leave not in module._forward_hooks.values():
                module.register_forward_hook(_leave, with_kwargs=True, always_call=True)
    return modules


def entrances(model: nn.Module) -> tuple[nn.Module, ...]:
    """The modules at which a forward over the cache may begin: the model, and its decoder if that is another one."""
    decoder = decoder_of(model)
    return (model,) if decoder is model else (model, decoder)


def is_running(module: nn.Module | None) -> bool:
    """Whether a call of a module is under way in this thread.

    An interrupt goes past all hooks of torch (nn/modules/module.py, `_call_impl`), so that none of them can tell.
    """
    frame: FrameType | None = None if module is None else sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is module:
            return True
        frame = frame.f_back
    return False


def _enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]] | None:
    if torch.compiler.is_dynamo_compiling():  # `is_compiling` is true in other threads as well
        caches = [value for value in (*args, *kwargs.values()) if isinstance(value, Streaming)]
        # mostly the step was begun before the graph runs; in `torch.compile(model)` it is begun in a break of it
        return None if not caches or caches[0].has_begun(module) else _begin_apart(module, args, kwargs)
    return _begin(module, args, kwargs)


def _begin(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, in_graph: bool = False
) -> tuple[tuple[()], dict[str, Any]] | None:
    cache = _sink_cache(module, args, kwargs)
    if cache is None:
        return None
    named = _named_arguments(module, args, kwargs)
    name = "inputs_embeds" if named.get("input_ids") is None else "input_ids"
    if named.get(name) is None:
        return None  # the model itself says what it misses
    _check_text_only(module, named)
    if cache.fed_ahead is not None:
        rest, cache.fed_ahead = cache.fed_ahead.cut(named[name], named.get("attention_mask")), None
        named = {**named, name: rest}
    fixed = (in_graph or _is_compiled(module)) and named[name].shape[1] == 1 and cache.can_be_fixed_now
    replaced = cache.begin_forward(module, named[name], named.get("attention_mask"), fixed=fixed)
    return None if replaced is None else ((), named | accepted(module, replaced))


def _is_compiled(module: nn.Module) -> bool:
    """Whether `model.forward = torch.compile(model.forward)` was said: then what is in the graph begins below us."""
    return hasattr(module.forward, "_torchdynamo_orig_callable")


def accepted(module: nn.Module, replaced: dict[str, Any]) -> dict[str, Any]:
    """Those arguments that the forward of a module takes."""
    names = _accepted_names(type(module).forward)
    return {name: value for name, value in replaced.items() if name in names}


@functools.lru_cache(maxsize=256)
def _accepted_names(forward: Callable[..., Any]) -> frozenset[str]:
    parameters = inspect.signature(forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    # "cache_position" among the others would reach attention functions that know nothing of it
    return frozenset(parameters).union(("position_ids", "attention_mask") if takes_any else ())


def _check_text_only(module: nn.Module, named: dict[str, Any]) -> None:
    """Images and sounds have positions of their own (M-RoPE), or see each other in both directions."""
    if others := [name for name in named if name in _OTHER_INPUTS and _is_given(named[name])]:
        raise UnsupportedGenerationError(
            f"{type(module).__name__} was given {', '.join(others)} with a SinkCache, which streams text alone. Leave "
            "them out, or use another cache."
        )


def _is_given(value: Any) -> bool:
    """`generate` passes a dict of None for encoders that had nothing to do."""
    return any(map(_is_given, value.values())) if isinstance(value, dict) else value is not None


def _leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    if torch.compiler.is_dynamo_compiling():
        caches = [value for value in (*args, *kwargs.values()) if isinstance(value, Streaming)]
        if caches and caches[0].was_begun_by(module):
            _end_apart(module, args, kwargs, output)
        return
    _end(module, args, kwargs, output)


def _end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    cache = _sink_cache(module, args, kwargs)
    if cache is not None:
        cache.end_forward(module, completed=output is not None)


_begin_apart: Callable[..., Any] = functools.partial(_begin, in_graph=True)
_end_apart: Callable[..., None] = _end
_is_apart = False


def _set_apart() -> None:
    """Keep dynamo out of both; not at import, as that would load dynamo where nobody has (transformers 4.52)."""
    global _begin_apart, _end_apart, _is_apart
    if not _is_apart:
        _begin_apart = torch.compiler.disable(_begin_apart)  # type: ignore[no-untyped-call]
        _end_apart = torch.compiler.disable(_end_apart)  # type: ignore[no-untyped-call]
        _is_apart = True


def _sink_cache(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Streaming | None:
    named = _named_arguments(module, args, kwargs)
    caches = [named.get(name) for name in CACHE_NAMES]
    return next((cache for cache in caches if isinstance(cache, Streaming)), None)


def _named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by name."""
    return {**dict(zip(_names(type(module).forward), args, strict=False)), **kwargs} if args else kwargs


@functools.lru_cache(maxsize=256)
def _names(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]  # without self
