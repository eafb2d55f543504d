"""transformers 5.0 to 5.3: all rotary modules keep their frequencies in buffers."""

from __future__ import annotations

from dataclasses import replace

from sink_patch.compat import v4_57
from sink_patch.compat.shim import Quirk

INDEXER = Quirk(
    "glm_moe_dsa", refusal="on transformers up to 5.10 its learned index keeps keys on the model, not in the cache"
)

ONE_TOO_MANY = Quirk("persimmon stablelm", explicit_mask=True)  # 5.0 guesses one column more than there is

SHIM = replace(v4_57.SHIM, quirks=(INDEXER, ONE_TOO_MANY))
