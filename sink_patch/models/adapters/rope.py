"""Adapters for rotary position embedding, from the frequencies that the model itself holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from sink_patch.arguments import check_function, whole_number
from sink_patch.buffers.rotation import Pairing, Rotation, check_rotation
from sink_patch.models.adapters.adapter import Adapter, AdapterFactory
from sink_patch.models.adapters.frequencies import buffer_of_layer, exact, frequency_buffers
from sink_patch.models.entries import read_entries, text_config

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

    def __post_init__(self) -> None:
        check_rotation(self.pairing, self.sign)
        if not callable(self.start):
            whole_number("start", self.start, 0, "of dims")
        if self.skips is not None:
            check_function("skips", self.skips, "(text config, layer index) to whether the layer has no positions")

    def __call__(self, model: nn.Module) -> Sequence[Adapter]:
        config, buffers = text_config(model), frequency_buffers(model)
        start = self.start(config) if callable(self.start) else self.start
        made: dict[str, Adapter] = {}  # layers that share a buffer share an adapter, and so its cosines
        result = []
        for layer_idx, entry in enumerate(read_entries(model)):
            if not entry.attention or (self.skips is not None and self.skips(config, layer_idx)):
                result.append(no_positions())
                continue
            name = buffer_of_layer(layer_idx, entry.layer_type, buffers)
            if name not in made:
                rotation = Rotation(exact(buffers[name]), self.pairing, start, self.sign)
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
    """A family function for models with rotary embeddings and `inv_freq` buffers: pass it to `register_family`.

    Args:
        pairing: which dims form a pair: "half" is (i, i + rotary_dim / 2), "interleaved" is (2i, 2i + 1).
        sign: +1, or -1 for a model that turns the other way.
        start: index of the first rotary dim in the head.
        skips: (text config, layer index) -> whether that layer has no positions; None: all layers have.

    Returns:
        From a model to one `Adapter` for each entry of its cache.

    Raises:
        SinkArgumentError: an unknown pairing or sign; no dim to start at; `skips` is no function.
    """
    return Rope(pairing, sign, start, skips)


@dataclass(frozen=True)
class SinusoidalTable:
    """Adapters of a family that looks up its angles in a table of base 10000 (such as GPT-J).

    Args:
        dim: text config -> rotary dim.
        pairing: see `Rotation`.
    """

    dim: Callable[[Any], int]
    pairing: Pairing = "interleaved"

    def __post_init__(self) -> None:
        check_rotation(self.pairing, 1)
        check_function("dim", self.dim, "the text config to the rotary dim")

    def __call__(self, model: nn.Module) -> Sequence[Adapter]:
        config = text_config(model)
        dim = self.dim(config)
        first = torch.arange(0, dim, 2, dtype=torch.int64, device="cpu")  # [dim / 2], the first dim of each pair
        exponents = first / dim  # [dim / 2], float32 as in modeling_gptj
        adapter = Adapter(keys=Rotation(exact(1.0 / (10000**exponents)), self.pairing))
        return [adapter for _ in read_entries(model)]

    def __str__(self) -> str:
        return f"{'interleaved' if self.pairing == 'interleaved' else 'half-split'} rotation from a table"


def sinusoidal_table(dim: Callable[[Any], int], pairing: Pairing = "interleaved") -> AdapterFactory:
    """A family function for models that look up their angles in a table of base 10000, as GPT-J does.

    Args:
        dim: text config -> rotary dim.
        pairing: see `rope`.

    Returns:
        From a model to one `Adapter` for each entry of its cache.

    Raises:
        SinkArgumentError: an unknown pairing; `dim` is no function.
    """
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
