"""Random weights with which attention is far from uniform, so that every parameter matters."""

from __future__ import annotations

import zlib

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tests.support.versions import PreTrainedConfig

_DECAYS = ("A_log",)  # must stay decays, also where they are a matrix
_SCALES = (".temp",)  # of keys (zaya): initialised to zero, which makes attention uniform

# transformers up to 4.53 initialises these to 1, although they add 1 to their weight
_START_AT_ZERO = frozenset({"GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm"})


def seeded(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, attn_implementation: str, seed: int
) -> PreTrainedModel:
    """A model in eval mode whose weights depend on its config and the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class._from_config(config, attn_implementation=attn_implementation).eval()
    randomise(model, seed)
    return model


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Draw embeddings with deviation 1 and matrices with 1.3 over the root of their width; change all others a little.

    The random numbers of a parameter depend on its name and the seed, so that they are the same on all versions.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    transposed = {id(module.weight) for module in model.modules() if isinstance(module, Conv1D)}
    for module in model.modules():
        if type(module).__name__ in _START_AT_ZERO:
            module.weight.zero_()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue  # sinusoids and the like
        drawn = _drawn(name, parameter, seed)
        if id(parameter) in embeddings:
            parameter.copy_(drawn)
        elif name.endswith(_SCALES):
            parameter.copy_(1 + 0.1 * drawn)
        elif sum(size > 1 for size in parameter.shape) < 2 or name.endswith(_DECAYS):
            parameter.add_(0.1 * drawn)
        else:
            width = parameter.shape[-2 if id(parameter) in transposed else -1]
            parameter.copy_(drawn * 1.3 / width**0.5)


def _drawn(name: str, parameter: nn.Parameter, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return torch.randn(parameter.shape, generator=generator)
