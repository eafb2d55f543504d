"""The record of one family of models."""

from __future__ import annotations

from dataclasses import dataclass

from sink_patch.adapters import AdapterFactory
from sink_patch.errors import SinkArgumentError


@dataclass(frozen=True)
class Family:
    """Models whose cached tensors turn in the same way, or that cannot stream for the same reason.

    Args:
        name: for people and error messages.
        model_types: the `model_type`s of the configs that it claims.
        adapters: from a model to one adapter for each of its attention layers, in order.
        refusal: why these models cannot stream; instead of `adapters`.
        has_table: whether the model looks angles up in a table of `max_position_embeddings` rows, beyond which there
            are no positions at all.
    """

    name: str
    model_types: tuple[str, ...]
    adapters: AdapterFactory | None = None
    refusal: str | None = None
    has_table: bool = False

    def __post_init__(self) -> None:
        types = self.model_types
        if not isinstance(types, tuple) or not types or not all(isinstance(one, str) and one for one in types):
            raise SinkArgumentError(f"Family {self.name!r}: model_types must be a tuple of names, got {types!r}.")
        if (self.adapters is None) == (self.refusal is None):
            raise SinkArgumentError(f"Family {self.name!r} needs either adapters or a refusal, and not both.")
