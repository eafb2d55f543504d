"""What users may say of a sink cache: its name, its sizes and how it forgets, the defaults, and what they may be."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from sink_patch.errors import SinkArgumentError

CACHE_IMPLEMENTATION = "sink"
"""The value of `cache_implementation` that asks for a sink cache."""
CUSTOM_GENERATE = "transformers-community/sink_cache"
"""The value of `custom_generate` that does: the repository that transformers names in place of its old `SinkCache`."""


TOKENS, TURNS = "tokens", "turns"
"""The values of `evict`: what leaves a full window is the oldest token, or the oldest whole message."""
SYSTEM = "system"
"""The value of `num_sink_tokens` that keeps the system message."""

Ids = tuple[int, ...]
"""A run of token ids."""


@dataclass(frozen=True)
class Sizes:
    """What a sink cache keeps: the only place of the defaults of the two sizes and of the checks.

    Args:
        window_length: tokens that are kept, sinks counted in.
        num_sink_tokens: how many of the first tokens of each row are kept for good.
        evict: what leaves a full window, "tokens" or "turns".
        turn_start: with "turns", the runs of ids that begin a message; one run or several.

    Raises:
        SinkArgumentError: not integers, negative, no room beside the sinks, an unknown `evict`, no ids, or "turns"
            without `turn_start`.
    """

    window_length: int = 256
    num_sink_tokens: int = 4
    evict: str = TOKENS
    turn_start: tuple[Ids, ...] = ()

    def __post_init__(self) -> None:
        for name in ("window_length", "num_sink_tokens"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), getattr(Sizes, name), "of tokens"))
        if self.window_length <= self.num_sink_tokens:
            raise SinkArgumentError(
                f"window_length={self.window_length} leaves no room beside num_sink_tokens={self.num_sink_tokens}: the "
                f"window counts the sinks. Use window_length={self.num_sink_tokens + 1} or more."
            )
        if self.evict not in (TOKENS, TURNS):
            raise SinkArgumentError(
                f"evict={self.evict!r} is not known. Use {TOKENS!r} (the oldest token leaves a full window) or "
                f"{TURNS!r} (the oldest whole message does)."
            )
        object.__setattr__(self, "turn_start", runs_of_ids("turn_start", self.turn_start))
        if self.evict == TURNS and not self.turn_start:
            raise SinkArgumentError(
                f"evict={TURNS!r} was asked for without turn_start, so that nobody knows where a message begins. Pass "
                "turn_start, the token ids that begin one in the chat template."
            )

    def as_settings(self) -> Settings:
        """The settings that ask for such a cache."""
        return Settings(self.window_length, self.num_sink_tokens, self.evict, self.turn_start)


@dataclass(frozen=True)
class Settings:
    """All that may be said of the sink cache in a call of `generate` or in a generation config.

    Args:
        window_length, evict, turn_start: as for `Sizes`.
        num_sink_tokens: as for `Sizes`; or "system": where a row begins with a system message, all that stands before
            the second message.
        system_start: with "system", the runs of ids that begin a system message; one run or several.
        keep_streams: how many ended streams of the model are kept, so that a longer text of the same beginning goes on
            in them.

    Raises:
        SinkArgumentError: as for `Sizes`; "system" without `system_start` and `turn_start`; a negative `keep_streams`.
    """

    window_length: int = Sizes.window_length
    num_sink_tokens: int | str = Sizes.num_sink_tokens
    evict: str = Sizes.evict
    turn_start: tuple[Ids, ...] = ()
    system_start: tuple[Ids, ...] = ()
    keep_streams: int = 0

    def __post_init__(self) -> None:
        for name in ("turn_start", "system_start"):
            object.__setattr__(self, name, runs_of_ids(name, getattr(self, name)))
        object.__setattr__(self, "keep_streams", whole_number("keep_streams", self.keep_streams, 8, "of streams"))
        if isinstance(self.num_sink_tokens, str) and self.num_sink_tokens != SYSTEM:
            raise SinkArgumentError(
                f"num_sink_tokens={self.num_sink_tokens!r} is not known. Give a number of tokens, or {SYSTEM!r}."
            )
        if self.keeps_system and not (self.turn_start and self.system_start):
            raise SinkArgumentError(
                f"num_sink_tokens={SYSTEM!r} was asked for without system_start and turn_start, so that nobody knows "
                "where a system message begins and ends. Pass both, as token ids of the chat template: "
                "sink_patch.chat_settings(tokenizer) finds them where the template marks system messages."
            )
        self.sizes()

    @property
    def keeps_system(self) -> bool:
        return self.num_sink_tokens == SYSTEM

    def sizes(self, num_sink_tokens: int | None = None) -> Sizes:
        """Those of a cache.

        Args:
            num_sink_tokens: how many tokens stay, where that depends on the text; None: the default number there.
        """
        if num_sink_tokens is None:
            num_sink_tokens = Sizes.num_sink_tokens if isinstance(self.num_sink_tokens, str) else self.num_sink_tokens
        return Sizes(self.window_length, num_sink_tokens, self.evict, self.turn_start)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in fields(cls))

    @classmethod
    def given_in(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Those of some arguments that are settings and are not None, unchecked."""
        return {name: arguments[name] for name in cls.names() if arguments.get(name) is not None}

    def as_dict(self) -> dict[str, Any]:
        """The two sizes, and what else is not as by default."""
        named = {name: getattr(self, name) for name in self.names()}
        sizes = ("window_length", "num_sink_tokens")
        return {name: value for name, value in named.items() if name in sizes or value != getattr(Settings, name)}


def whole_number(name: str, value: Any, example: Any, of_what: str, *, may_be_negative: bool = False) -> int:
    """An argument that is a number of something; a tensor with one integer will do.

    Raises:
        SinkArgumentError: no integer, or a negative one.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:  # tensors have `__index__` whatever they hold
        number = None
    if number is None:
        raise SinkArgumentError(
            f"{name}={value!r} is a {type(value).__name__}. Give a number {of_what}: an integer such as {example}."
        )
    if number < 0 and not may_be_negative:
        raise SinkArgumentError(f"{name}={number} is negative. Give a number {of_what}, 0 or more.")
    return number


def check_function(name: str, value: Any, from_what: str) -> None:
    """Raise where an argument is no function.

    Raises:
        SinkArgumentError: it is none.
    """
    if not callable(value):
        raise SinkArgumentError(f"{name}={value!r} is a {type(value).__name__}. Give a function from {from_what}.")


def runs_of_ids(name: str, value: Any) -> tuple[Ids, ...]:
    """Runs of ids, given as one run or as several."""
    several = [value] if isinstance(value, Sequence) and value and _is_id(value[0]) else value
    if isinstance(several, Sequence) and not isinstance(several, str):
        runs = [run for run in several if isinstance(run, Sequence) and run and all(map(_is_id, run))]
        if len(runs) == len(several):
            return tuple(tuple(operator.index(token) for token in run) for run in runs)
    raise SinkArgumentError(f"{name}={value!r} is no run of token ids. Give a list of ids, or several such lists.")


def _is_id(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool) and value >= 0
