"""What is known of one request beside what transformers knows: its clock, its sinks, and how its text is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from sink_patch.generation.inputs.cuts import Text
from sink_patch.kept.sameness import Digest

_NAME = "_sink_stream"

Model = tuple[Digest, Digest]
"""The weights of a model, with how often `kept_streams.clear` was called, and its settings; at some time."""


@dataclass(frozen=True)
class Reading:
    """How the text of a request is read, from its beginning to its end.

    Args:
        text: of its prompt.
        model: as it was in the beginning; None: the slot is not kept.
        copy_at: after how many tokens a copy of the slot is made, from before the answer; None: none is made.
        begins_at_end: whether that is the end of an answer.
        goes_back: whether it goes on in a slot from before the end of another answer.
    """

    text: Text
    model: Model | None = None
    copy_at: int | None = None
    begins_at_end: bool = False
    goes_back: bool = False


@dataclass(eq=False)
class Stream:
    """The clock of a request, and its sinks.

    It lives on the request, so that it goes where the request goes: to the CPU and back, into a fork, away.

    Args:
        base: how far its clock has been set back, as of `Row`.
        shown: by how many positions the sinks in its pages are turned.
        pristine: its sinks as the model made them, a tensor [layers * num_sink_tokens, heads, dim] for each set of
            layers that turn alike; empty until they are turned first.
        waits: whether a piece of its prompt found no room in the batch before.
        is_one_of_many: whether it is one of several texts for a prompt.
        reading: how it is read; None: it has not begun.
        sought: in which kept slot it can begin, and when that was looked up; None: it was not.
    """

    base: int = 0
    shown: int = 0
    pristine: list[torch.Tensor] = field(default_factory=list)
    waits: bool = False
    is_one_of_many: bool = False
    reading: Reading | None = None
    sought: Any = None


def stream_of(state: Any) -> Stream:
    """The stream of a request (`RequestState`)."""
    found: Stream | None = vars(state).get(_NAME)
    if found is None:
        found = Stream()
        setattr(state, _NAME, found)
    return found


def prompt_of(state: Any) -> int:
    """Tokens of its prompt; a request that lost its pages is begun anew with what was generated behind the prompt."""
    return int(state._true_initial_tokens or len(state.initial_tokens))


def limit_of(state: Any) -> int:
    """Tokens of a request when it ends, at most."""
    return len(state.initial_tokens) + int(state._new_tokens_limit)
