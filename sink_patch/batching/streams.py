"""What is known of one request beside what transformers keeps of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

_NAME = "_sink_stream"


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
    """

    base: int = 0
    shown: int = 0
    pristine: list[torch.Tensor] = field(default_factory=list)
    waits: bool = False


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
