"""The entries of a model's own cache: which of them hold attention, and of what kind."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from sink_patch.compat import Entry, installed_shim
from sink_patch.compat import models as transformers_models
from sink_patch.errors import UnsupportedModelError

CACHE_NAMES: tuple[str, ...] = transformers_models.CACHE_NAMES
"""What forwards of transformers call their cache."""


def text_config(model: Any) -> Any:
    """The config of the language model, also where it is a part of a larger one."""
    return model.config.get_text_config(decoder=True)


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT or torch.compile wrapper."""
    inner: Sequence[Any] = (getattr(model, "_orig_mod", None), getattr(model, "get_base_model", lambda: None)())
    return next((unwrapped(one) for one in inner if isinstance(one, nn.Module)), model)


def given_to_hooks(module: nn.Module) -> frozenset[str]:
    """What hooks of a module were given for one call, by name, as PEFT does ("adapter_names", "alora_offsets")."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return frozenset[str]().union(*(hook.keywords for hook in hooks if isinstance(hook, functools.partial)))


def decoder_of(model: Any) -> nn.Module:
    """The part that takes the cache and builds masks: `get_decoder()`, except where that finds an output head."""
    found: nn.Module = transformers_models.decoder_of(model)
    candidates: list[nn.Module] = [found, getattr(model, "base_model", model), model]
    return next((one for one in candidates if names_of_cache(one)), model)


def cache_argument(module: nn.Module) -> str:
    """What the forward of a model, or of its decoder, calls its cache."""
    return next(iter(names_of_cache(module)), CACHE_NAMES[0])


def names_of_cache(module: nn.Module) -> Sequence[str]:
    """Those of `CACHE_NAMES` that the forward of a module takes by name."""
    return _names_in(type(module).forward)


@functools.lru_cache(maxsize=256)
def _names_in(forward: Callable[..., Any]) -> Sequence[str]:
    parameters = inspect.signature(forward).parameters
    return tuple(name for name in CACHE_NAMES if name in parameters)


def own_layers(config: Any) -> Sequence[Any]:
    """Fresh layers of transformers' own cache for a text config."""
    return installed_shim().own_layers(config)


def read_entries(model: nn.Module) -> Sequence[Entry]:
    """All entries of a model's own cache, in order.

    Raises:
        UnsupportedModelError: an entry is of an unknown kind.
    """
    entries = installed_shim().read_entries(text_config(model))
    for layer_idx, entry in enumerate(entries):
        if entry.unknown is not None:
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot stream with attention sinks: layer {layer_idx} of its cache is a "
                f"{entry.unknown} ({entry.layer_type}); only full and sliding-window attention and recurrent states "
                "are known. Use another cache_implementation."
            )
    return entries


def input_device(model: Any) -> torch.device:
    """The device of a model's inputs; the CPU where accelerate has offloaded the weights, and moves inputs itself."""
    return torch.device("cpu") if model.device.type == "meta" else model.device
