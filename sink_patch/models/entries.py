"""The entries of a model's own cache: which of them hold attention, and of what kind."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from sink_patch.compat import Entry, installed_shim
from sink_patch.errors import UnsupportedModelError

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""What transformers calls a cache: from 5.24 on, before, and in models of states alone (Mamba) before."""


def text_config(model: Any) -> Any:
    """The config of the language model, also where it is a part of a larger one."""
    return model.config.get_text_config(decoder=True)


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT or torch.compile wrapper."""
    inner: Sequence[Any] = (getattr(model, "_orig_mod", None), getattr(model, "get_base_model", lambda: None)())
    return next((unwrapped(one) for one in inner if isinstance(one, nn.Module)), model)


def decoder_of(model: Any) -> nn.Module:
    """The part that takes the cache and builds masks: `get_decoder()`, except where that finds an output head."""
    found: Any = model.get_decoder() if hasattr(model, "get_decoder") else model
    if not isinstance(found, nn.Module):
        found = found()  # in 4.53 and 4.54 some vision-language models return the method of their inner model
    candidates: list[nn.Module] = [found, getattr(model, "base_model", model), model]
    return next((one for one in candidates if _names_of_cache(one)), model)


def cache_argument(module: nn.Module) -> str:
    """What the forward of a model, or of its decoder, calls its cache."""
    return next(iter(_names_of_cache(module)), CACHE_NAMES[0])


def _names_of_cache(module: nn.Module) -> Sequence[str]:
    return _names_in(type(module).forward)


@functools.lru_cache(maxsize=256)
def _names_in(forward: Callable[..., Any]) -> Sequence[str]:
    parameters = inspect.signature(forward).parameters
    return tuple(name for name in CACHE_NAMES if name in parameters)


def own_layers(config: Any) -> Sequence[Any]:
    """Fresh layers of transformers' own cache for a text config."""
    return installed_shim().own_layers(config)


def read_entries(model: nn.Module) -> Sequence[Entry]:
    """All entries, in order.

    Raises:
        UnsupportedModelError: one of them is of a kind that is not known.
    """
    entries = installed_shim().read_entries(text_config(model))
    for layer_idx, entry in enumerate(entries):
        if entry.unknown is not None:
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot stream with attention sinks: layer {layer_idx} of its cache is a "
                f"{entry.unknown} ({entry.layer_type}); only full and sliding-window attention and recurrent states "
                "are known."
            )
    return entries


def input_device(model: Any) -> torch.device:
    """Where a model wants its inputs; the CPU, where accelerate has put its weights away and takes inputs on."""
    return torch.device("cpu") if model.device.type == "meta" else model.device
