"""Saved caches, looked into and changed; and a model whose saved cache is kept among the tests."""

from __future__ import annotations

import copy
import json
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from tests.support.tiny import tiny

FORMAT_1 = Path(__file__).parents[1] / "cache" / "format_1.safetensors"
"""Saved by sink_patch 0.1.0 (commit 9900a59) with `steady_model()`: `steady_text(50)` in two rows, 20 columns and then
one by one, in SinkCache(12, 3)."""


def without_hooks(model: nn.Module) -> nn.Module:
    """A copy of a model with which nothing has streamed yet."""
    model = copy.deepcopy(model)
    for module in model.modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    return model


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def header_text(path: Path) -> str:
    with safe_open(path, framework="pt") as file:
        return file.metadata()["sink_patch"]


def header_of(path: Path) -> dict[str, Any]:
    return json.loads(header_text(path))


def rewrite(path: Path, text: str, **changed: torch.Tensor | None) -> None:
    """Give a file another header, and other tensors (`__` in their names stands for a dot); None: without one."""
    tensors = load_file(path)
    tensors.update({name.replace("__", "."): tensor for name, tensor in changed.items()})
    kept = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, path, metadata={"sink_patch": text})


@torch.no_grad()
def steady_model() -> nn.Module:
    """A llama whose weights are the same to the bit on any machine and with any torch, as no number is drawn."""
    model = without_hooks(tiny("llama", layers=2, max_position_embeddings=32))
    for name, parameter in model.named_parameters():
        mixed = (torch.arange(parameter.numel()) * 7919 + zlib.crc32(name.encode())) * 2654435761 % 1009
        spread = ((mixed - 504).float() / 512).view(parameter.shape)  # between -1 and 1
        scale, centre = (0.125, 1.0) if parameter.ndim == 1 else (2.0 if "embed" in name else 0.25, 0.0)
        parameter.copy_(centre + scale * spread)
    return model


def steady_text(columns: int) -> torch.Tensor:
    """Token ids [2, columns]."""
    return (torch.arange(2 * columns).view(columns, 2).T * 1009 + 17) % 97
