"""transformers 5.5 and 5.6: delta-rule states start anew, too, with each forward of several tokens."""

from __future__ import annotations

from dataclasses import replace

from sink_patch.compat import v5_7
from sink_patch.compat.shim import Quirk

DELTA_RULE = Quirk(
    "qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next",
    whole_prompts="On transformers up to 5.6 states of this model start anew with each forward of several tokens",
)

SHIM = replace(v5_7.SHIM, quirks=(*v5_7.SHIM.quirks, DELTA_RULE))
