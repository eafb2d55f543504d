"""The adapter record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from sink_patch.buffers.rotation import Rotation
from sink_patch.errors import SinkArgumentError


@dataclass(frozen=True, eq=False)
class Adapter:
    """How one layer's cached tensors turn when its tokens move; None: that tensor does not turn.

    Args:
        keys: rotation of the cached keys.
        values: rotation of the cached "values" (MLA with a latent cache keeps the rotated part there).

    Raises:
        SinkArgumentError: another thing than a `Rotation`.
    """

    keys: Rotation | None = None
    values: Rotation | None = None

    def __post_init__(self) -> None:
        for name, one in (("keys", self.keys), ("values", self.values)):
            if not isinstance(one, Rotation | None):
                raise SinkArgumentError(
                    f"{name} of an Adapter are a {type(one).__name__}. Give a sink_patch.Rotation, or None."
                )

    @property
    def turns(self) -> bool:
        return self.keys is not None or self.values is not None

    def same_as(self, other: Adapter) -> bool:
        pairs = ((self.keys, other.keys), (self.values, other.values))
        return all(a is b or (a is not None and b is not None and a.same_as(b)) for a, b in pairs)

    def describe(self) -> str:
        """For people: "half-split rotation of 64 dims"."""
        parts = [_describe("keys", self.keys), _describe("values", self.values)]
        return ", ".join(part for part in parts if part) or "no positions"


AdapterFactory = Callable[[nn.Module], Sequence[Adapter]]
"""From a model to one adapter for each entry of its cache, in order; `no_positions()` for one without attention."""


def _describe(what: str, rotation: Rotation | None) -> str:
    if rotation is None:
        return ""
    pairing = {"half": "half-split", "interleaved": "interleaved"}[rotation.pairing]
    start = f" from dim {rotation.start}" if rotation.start else ""
    direction = " reversed" if rotation.sign < 0 else ""
    return f"{what}: {pairing} rotation of {rotation.rotary_dim} dims{start}{direction}"
