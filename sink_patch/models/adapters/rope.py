"""Adapters for rotary position embedding, from the frequencies that the model itself holds."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from sink_patch.buffers.rotation import Pairing, Rotation
from sink_patch.errors import UnsupportedModelError
from sink_patch.models.adapters.adapter import Adapter, AdapterFactory
from sink_patch.models.entries import decoder_of, read_entries, text_config

SkipsPositions = Callable[[Any, int], bool]
"""(text config, layer index) -> whether that layer has no positions (NoPE)."""


@dataclass(frozen=True)
class Rope:
    """Adapters of a family whose model holds its inverse frequencies in `inv_freq` buffers.

    Args:
        pairing, sign, start: see `Rotation`; `start` may be a function of the text config.
        skips: which layers have no positions; None: all have.
        cached_in: the tensor that turns: "keys", or "values" (MLA with a latent cache).
    """

    pairing: Pairing = "half"
    sign: int = 1
    start: int | Callable[[Any], int] = 0
    skips: SkipsPositions | None = None
    cached_in: Literal["keys", "values"] = "keys"

    def __call__(self, model: nn.Module) -> Sequence[Adapter]:
        config, buffers = text_config(model), frequency_buffers(model)
        start = self.start(config) if callable(self.start) else self.start
        made: dict[str, Adapter] = {}  # layers that share a buffer share an adapter, and so its cosines
        result = []
        for layer_idx, entry in enumerate(read_entries(model)):
            if not entry.attention or (self.skips is not None and self.skips(config, layer_idx)):
                result.append(no_positions())
                continue
            name = _buffer_of(layer_idx, entry.layer_type, buffers)
            if name not in made:
                rotation = Rotation(_pristine(buffers[name]), self.pairing, start, self.sign)
                made[name] = Adapter(**{self.cached_in: rotation})
            result.append(made[name])
        return result

    def __str__(self) -> str:
        pairing = "half-split" if self.pairing == "half" else "interleaved"
        parts = [f"{pairing} rotation", "reversed" if self.sign < 0 else "", "of the latent cache's values"]
        kept = [part for part in parts[: 3 if self.cached_in == "values" else 2] if part]
        return " ".join(kept) + (", some layers without positions" if self.skips is not None else "")


def rope(
    pairing: Pairing = "half", *, sign: int = 1, start: int = 0, skips: SkipsPositions | None = None
) -> AdapterFactory:
    """See `Rope`."""
    return Rope(pairing, sign, start, skips)


@dataclass(frozen=True)
class SinusoidalTable:
    """Adapters of a family that looks its angles up in a table of base 10000 (GPT-J and its kin).

    Args:
        dim: text config -> rotary dim.
        pairing: see `Rotation`.
    """

    dim: Callable[[Any], int]
    pairing: Pairing = "interleaved"

    def __call__(self, model: nn.Module) -> Sequence[Adapter]:
        config = text_config(model)
        dim = self.dim(config)
        exponents = torch.arange(0, dim, 2, dtype=torch.int64) / dim  # float32, as in modeling_gptj
        adapter = Adapter(keys=Rotation(_pristine(1.0 / (10000**exponents)), self.pairing))
        return [adapter for _ in read_entries(model)]

    def __str__(self) -> str:
        return f"{'interleaved' if self.pairing == 'interleaved' else 'half-split'} rotation from a table"


def sinusoidal_table(dim: Callable[[Any], int], pairing: Pairing = "interleaved") -> AdapterFactory:
    """See `SinusoidalTable`."""
    return SinusoidalTable(dim, pairing)


@dataclass(frozen=True)
class Unrotated:
    """Adapters of a family whose cached tensors do not depend on position at all.

    Args:
        how: how position enters instead, for people.
    """

    how: str

    def __call__(self, model: nn.Module) -> Sequence[Adapter]:
        return [no_positions() for _ in read_entries(model)]

    def __str__(self) -> str:
        return self.how


def no_positions() -> Adapter:
    """The adapter of a layer whose cached tensors do not depend on position."""
    return Adapter()


def frequency_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The decoder's `inv_freq` buffers by name; where the rope type changes them as it goes, the original ones."""
    found = {}
    for path, module in decoder_of(model).named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("inv_freq") and not name.endswith("original_inv_freq"):
                found[f"{path}.{name}" if path else name] = _in_use_at_first(module, name, buffer)
    return found


def _in_use_at_first(module: nn.Module, name: str, buffer: torch.Tensor) -> torch.Tensor:
    """The buffer itself, or what its module holds in it for short texts (modeling_rope_utils.dynamic_rope_update)."""
    original: torch.Tensor = getattr(module, re.sub(r"inv_freq$", "original_inv_freq", name), buffer)
    if original.is_meta:
        return buffer  # in 5.x a plain attribute is left without values, so that the model cannot use it
    if "longrope" in str(getattr(module, "rope_type", "")):
        return original  # put into the buffer at each forward
    # in 4.x the original is no buffer, so that casting a model leaves it as it was, and the model does not use it
    return buffer if torch.equal(original.to(buffer), buffer) else original


def _buffer_of(layer_idx: int, layer_type: str | None, buffers: dict[str, torch.Tensor]) -> str:
    """Which buffer a layer uses: its own module's, else its layer type's, else the common one."""
    own = [name for name in buffers if f".{layer_idx}." in name]
    typed = [name for name in buffers if name.endswith((f"{layer_type}_inv_freq", f"{layer_type}.inv_freq"))]
    common = [name for name in buffers if name.rsplit(".", 1)[-1] == "inv_freq" and not re.search(r"\.\d+\.", name)]
    # in 4.x, Gemma 3 and its kin have one rotary module for layers with a sliding window, and one for the others
    local = [name for name in common if ("local" in name) == (layer_type == "sliding_attention")]
    for names in (own, typed, common, local):
        if len(names) == 1:
            return names[0]
    raise UnsupportedModelError(
        f"No rotary frequencies were found for layer {layer_idx} ({layer_type}): the model's inv_freq buffers are "
        f"{sorted(buffers) or 'none'}. Register the family with an adapter of its own: sink_patch.register_family."
    )


def _pristine(inv_freq: torch.Tensor) -> torch.Tensor:
    return inv_freq.detach().to(device="cpu", dtype=torch.float64, copy=True)
