"""Whether the modules of a model can be traced as one graph: not where FSDP gathers weights between its layers."""

from __future__ import annotations

import sys

from torch import nn


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP gathers its weights, from which it keeps the compiler out.

    What tensor parallel adds are operations of a graph; layers of other processes are known from the facts.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # whoever has sharded the model has imported it
    kinds = tuple(getattr(fsdp, name) for name in ("FSDPModule", "FullyShardedDataParallel") if hasattr(fsdp, name))
    return any(isinstance(module, kinds) for module in model.modules())
