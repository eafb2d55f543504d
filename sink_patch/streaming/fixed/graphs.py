"""Whether the forward of a model can be one graph: not where processes talk to each other between its layers."""

from __future__ import annotations

import sys

from torch import nn

from sink_patch.models.facts import ModelFacts


def can_be_one_graph(model: nn.Module, facts: ModelFacts) -> bool:
    """Whether torch can trace the forward as a whole.

    FSDP keeps the compiler out of where it gathers weights, and a pipeline's sending and receiving is traced by no
    released torch as it stands. What tensor parallel adds are operations of a graph.
    """
    if any(layer.elsewhere for layer in facts.layers):
        return False
    fsdp = sys.modules.get("torch.distributed.fsdp")  # whoever has sharded the model has imported it
    kinds = tuple(getattr(fsdp, name) for name in ("FSDPModule", "FullyShardedDataParallel") if hasattr(fsdp, name))
    return not any(isinstance(module, kinds) for module in model.modules())
