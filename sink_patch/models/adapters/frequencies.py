"""The inverse frequencies that a model holds, and which of them each layer uses."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn

from sink_patch.compat.models import frequencies_of_short_texts
from sink_patch.errors import UnsupportedModelError
from sink_patch.models.entries import decoder_of


def frequency_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The decoder's `inv_freq` buffers by name, [rotary_dim / 2] each.

    Where the rope type changes a buffer as the text grows, its values for short texts.
    """
    found = {}
    for path, module in decoder_of(model).named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("inv_freq") and not name.endswith("original_inv_freq"):
                full_name = f"{path}.{name}" if path else name
                found[full_name] = frequencies_of_short_texts(module, name, buffer)
    return found


def buffer_of_layer(layer_idx: int, layer_type: str | None, buffers: Mapping[str, torch.Tensor]) -> str:
    """The name of the buffer that a layer uses: its own module's, else its layer type's, else the common one.

    Examples: "layers.3.self_attn.rotary_emb.inv_freq" is a layer's own; "rotary_emb.sliding_attention_inv_freq" is of
    a layer type; "rotary_emb.inv_freq" is common to all layers, or, where "rotary_emb_local.inv_freq" stands beside
    it, to those without a sliding window.

    Args:
        layer_idx: of the layer in the cache.
        layer_type: as in the config's `layer_types`.
        buffers: from `frequency_buffers`.

    Raises:
        UnsupportedModelError: no buffer, or more than one, would do.
    """
    own = [name for name in buffers if f".{layer_idx}." in name]
    typed = [name for name in buffers if name.endswith((f"{layer_type}_inv_freq", f"{layer_type}.inv_freq"))]
    common = [name for name in buffers if name.rsplit(".", 1)[-1] == "inv_freq" and not re.search(r"\.\d+\.", name)]
    by_window = [name for name in common if ("local" in name) == (layer_type == "sliding_attention")]
    for names in (own, typed, common, by_window):
        if len(names) == 1:
            return names[0]
    raise UnsupportedModelError(
        f"No rotary frequencies were found for layer {layer_idx} ({layer_type}): the model's inv_freq buffers are "
        f"{sorted(buffers) or 'none'}. Register the family with an adapter of its own: sink_patch.register_family."
    )


def exact(inv_freq: torch.Tensor) -> torch.Tensor:
    """A copy in float64 on the CPU, as `Rotation` takes it; later changes of the model's buffer do not reach it."""
    return inv_freq.detach().to(device="cpu", dtype=torch.float64, copy=True)
