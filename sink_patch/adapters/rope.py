"""Adapters for rotary position embedding, from the frequencies that the model itself holds."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from sink_patch.adapters.base import Adapter, AdapterFactory
from sink_patch.errors import UnsupportedModelError
from sink_patch.rotation import Pairing, Rotation

SkipsPositions = Callable[[Any, int], bool]
"""(text config, layer index) -> whether that layer has no positions (NoPE)."""


def text_config(model: Any) -> Any:
    """The config of the language model, also where it is a part of a larger one."""
    return model.config.get_text_config(decoder=True)


def rope(
    pairing: Pairing = "half", *, sign: int = 1, start: int = 0, skips: SkipsPositions | None = None
) -> AdapterFactory:
    """Adapters of a family whose model holds its inverse frequencies in `inv_freq` buffers.

    Args:
        pairing, sign, start: see `Rotation`.
        skips: which layers have no positions; None: all have.
    """

    def adapters(model: nn.Module) -> Sequence[Adapter]:
        config = text_config(model)
        buffers = frequency_buffers(model)
        made: dict[str, Adapter] = {}  # layers that share a buffer share an adapter, and so its cosines
        result = []
        for layer_idx, layer_type in enumerate(layer_types(config)):
            if skips is not None and skips(config, layer_idx):
                result.append(no_positions())
                continue
            name = _buffer_of(layer_idx, layer_type, buffers)
            if name not in made:
                made[name] = Adapter(keys=Rotation(_pristine(buffers[name]), pairing, start, sign))
            result.append(made[name])
        return result

    return adapters


def sinusoidal_table(dim: Callable[[Any], int], pairing: Pairing = "interleaved") -> AdapterFactory:
    """Adapters of a family that looks its angles up in a table of base 10000 (GPT-J and its kin).

    Args:
        dim: text config -> rotary dim.
    """

    def adapters(model: nn.Module) -> Sequence[Adapter]:
        config = text_config(model)
        exponents = torch.arange(0, dim(config), 2, dtype=torch.int64) / dim(config)  # float32, as in modeling_gptj
        adapter = Adapter(keys=Rotation(_pristine(1.0 / (10000**exponents)), pairing))
        return [adapter] * config.num_hidden_layers

    return adapters


def no_positions() -> Adapter:
    """The adapter of a layer whose cached tensors do not depend on position."""
    return Adapter()


def layer_types(config: Any) -> list[str | None]:
    """The config's `layer_types`, or one None a layer."""
    return list(getattr(config, "layer_types", None) or [None] * config.num_hidden_layers)


def frequency_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The decoder's `inv_freq` buffers by name; where the rope type changes them as it goes, the original ones."""
    get_decoder = getattr(model, "get_decoder", None)
    decoder = model if get_decoder is None else get_decoder()
    found = {name: buffer for name, buffer in decoder.named_buffers() if name.endswith("inv_freq")}
    return {
        name: found.get(re.sub(r"inv_freq$", "original_inv_freq", name), buffer)
        for name, buffer in found.items()
        if not name.endswith("original_inv_freq")
    }


def _buffer_of(layer_idx: int, layer_type: str | None, buffers: dict[str, torch.Tensor]) -> str:
    """Which buffer a layer uses: its own module's, else its layer type's, else the common one."""
    own = [name for name in buffers if f".{layer_idx}." in name]
    typed = [name for name in buffers if name.rsplit(".", 1)[-1] == f"{layer_type}_inv_freq"]
    common = [name for name in buffers if name.rsplit(".", 1)[-1] == "inv_freq" and not re.search(r"\.\d+\.", name)]
    for names in (own, typed, common):
        if len(names) == 1:
            return names[0]
    raise UnsupportedModelError(
        f"No rotary frequencies were found for layer {layer_idx} ({layer_type}): the model's inv_freq buffers are "
        f"{sorted(buffers) or 'none'}. Register the family with an adapter of its own: sink_patch.register_family."
    )


def _pristine(inv_freq: torch.Tensor) -> torch.Tensor:
    return inv_freq.detach().to(device="cpu", dtype=torch.float64, copy=True)
