"""The record of one family of models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sink_patch.arguments import check_function
from sink_patch.errors import SinkArgumentError
from sink_patch.models.adapters.adapter import AdapterFactory

PositionSource = Literal["position_ids", "columns"]


@dataclass(frozen=True)
class PositionLimit:
    """Positions past which attention depends on more than distance, or there are none.

    Args:
        of: from the text config to their number.
        why: for people, as in "its positions end at 2048: it looks its angles up in a table".

    Raises:
        SinkArgumentError: `of` is no function.
    """

    of: Callable[[Any], int]
    why: str

    def __post_init__(self) -> None:
        check_function("of", self.of, "the text config to the number of positions")


@dataclass(frozen=True)
class OneByOne:
    """After the first forward a text can go in by single tokens only.

    Args:
        reason: why, as a sentence without its end.
        beyond: where no more than so many tokens are visible, several may follow others all the same.
    """

    reason: str
    beyond: int = 0


@dataclass(frozen=True)
class Family:
    """Models whose cached tensors turn in the same way, or that cannot stream for the same reason.

    Args:
        name: for people and error messages.
        model_types: the `model_type`s of the configs that it claims.
        adapters: from a model to one adapter for each entry of its cache, in order.
        refusal: why these models cannot stream; instead of `adapters`.
        position_limit: how many positions may be used at all, and why; None: there is no limit.
        position_source: where the model's forward takes positions from: "position_ids", or "columns", the order of the
            keys (ALiBi). A function of the text config where it depends.
        explicit_mask: whether its forward is causal only where it is given a mask.
        formerly: adapters for the same models where transformers caches other tensors for them (DeepSeek-V3: expanded
            keys, not the latent cache). The probe decides which of the two hold.
        whole_prompts: why several tokens cannot follow others in one forward (in transformers itself), as a sentence
            without its end; None: they can. Where the model has sliding windows, it is so beyond them.

    Raises:
        SinkArgumentError: no names; neither adapters nor a refusal, or both; what should be a function is none; no
            `PositionLimit`; or an unknown source of positions.
    """

    name: str
    model_types: tuple[str, ...]
    adapters: AdapterFactory | None = None
    refusal: str | None = None
    position_limit: PositionLimit | None = None
    position_source: PositionSource | Callable[[Any], PositionSource] = "position_ids"
    explicit_mask: bool = False
    formerly: AdapterFactory | None = None
    whole_prompts: str | None = None

    def position_source_of(self, config: Any) -> PositionSource:
        """For a model with this text config."""
        return self.position_source(config) if callable(self.position_source) else self.position_source

    def __post_init__(self) -> None:
        types, limit, source = self.model_types, self.position_limit, self.position_source
        if not isinstance(self.name, str) or not self.name:
            raise SinkArgumentError(f"A Family has the name {self.name!r}. Give it one for people, as a text.")
        if not isinstance(types, tuple) or not types or not all(isinstance(one, str) and one for one in types):
            raise SinkArgumentError(f"Family {self.name!r}: model_types must be a tuple of names, got {types!r}.")
        if (self.adapters is None) == (self.refusal is None):
            raise SinkArgumentError(f"Family {self.name!r} needs either adapters or a refusal, and not both.")
        for name in ("adapters", "formerly"):
            if getattr(self, name) is not None:
                check_function(name, getattr(self, name), "a model to one Adapter for each entry of its cache")
        if not isinstance(limit, PositionLimit | None):
            raise SinkArgumentError(f"Family {self.name!r}: position_limit={limit!r} is no PositionLimit.")
        if not callable(source) and source not in get_args(PositionSource):
            raise SinkArgumentError(
                f"Family {self.name!r}: position_source={source!r} is not known. Use one of {get_args(PositionSource)}."
            )
