"""Copies of a cache in memory."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, TypeVar

import torch

from sink_patch.cache.packing import tensors_in

_Cache = TypeVar("_Cache")


@torch.inference_mode(False)  # else the copy could not be written to outside it
def copied(cache: _Cache, layers: Iterable[Any], memo: dict[int, Any]) -> _Cache:
    """A copy of a cache that shares no tensor with it, and belongs to the same model.

    Args:
        layers: of the cache. Their states may hang on the graph of a forward with gradients, and such tensors refuse to
            be copied as a whole.
        memo: of `copy.deepcopy`.
    """
    twin: _Cache = object.__new__(type(cache))
    memo[id(cache)] = twin
    held = [tensor for layer in layers for tensor in tensors_in(vars(layer))]
    memo.update((id(tensor), tensor.detach().clone()) for tensor in held)
    vars(twin).update(copy.deepcopy(vars(cache), memo))
    return twin
