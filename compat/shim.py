"""The record of what sink_patch touches in one range of versions of transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Wrapper = Callable[[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any]


@dataclass(frozen=True)
class Constant:
    """A tuple of names in a module of transformers to which ours is added, and from which it is taken away again."""

    module: str
    name: str
    entry: str


@dataclass(frozen=True)
class Method:
    """A method of a class of transformers that is wrapped.

    Args:
        module, owner, name: where it is.
        parameters: those that our wrapper reads; the method must have them.
        role: which of our wrappers goes around it.
    """

    module: str
    owner: str
    name: str
    parameters: tuple[str, ...]
    role: str


@dataclass(frozen=True)
class Shim:
    """All places, for the versions of one row of the table."""

    constants: tuple[Constant, ...]
    methods: tuple[Method, ...]
