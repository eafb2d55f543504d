"""Models whose forward cannot be one graph, as processes talk to each other between its layers."""

from __future__ import annotations

import sys

from torch import nn

from sink_patch.models.facts import ModelFacts


def runs_in_pieces(model: nn.Module, facts: ModelFacts) -> bool:
    """Whether torch cannot trace the forward as a whole.

    FSDP keeps the compiler out of where it gathers weights, and a pipeline's sending and receiving is traced by no
    released torch as it stands. What tensor parallel adds are operations of a graph.
    """
    if any(layer.elsewhere for layer in facts.layers):
        return True
    fsdp = sys.modules.get("torch.distributed.fsdp")  # whoever has sharded the model has imported it
    kinds = tuple(getattr(fsdp, name) for name in ("FSDPModule", "FullyShardedDataParallel") if hasattr(fsdp, name))
    return any(isinstance(module, kinds) for module in model.modules())
