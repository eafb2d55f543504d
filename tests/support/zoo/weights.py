"""Random weights by which attention is far from uniform, so that every parameter matters."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

_DECAYS = ("A_log",)  # must stay decays, even where they are written as a matrix
_SCALES = (".temp",)  # of keys (zaya): zero at first, which makes attention uniform


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Draw embeddings with deviation 1 and matrices with 1.3 over the root of their width; nudge all others."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    transposed = {id(module.weight) for module in model.modules() if isinstance(module, Conv1D)}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue  # sinusoids and the like
        drawn = torch.randn(parameter.shape, generator=generator)
        if id(parameter) in embeddings:
            parameter.copy_(drawn)
        elif name.endswith(_SCALES):
            parameter.copy_(1 + 0.1 * drawn)
        elif sum(size > 1 for size in parameter.shape) < 2 or name.endswith(_DECAYS):
            parameter.add_(0.1 * drawn)
        else:
            width = parameter.shape[-2 if id(parameter) in transposed else -1]
            parameter.copy_(drawn * 1.3 / width**0.5)
