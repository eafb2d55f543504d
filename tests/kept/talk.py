"""Turns of a talk with `keep_streams`: how many tokens each forward read, and a replay of these forwards by hand."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from sink_patch import SinkCache
from tests.support.tiny import tiny

W, S = 24, 4
SINK = {"cache_implementation": "sink", "window_length": W, "num_sink_tokens": S}


def llama(**settings: Any) -> PreTrainedModel:
    """Of two layers; clocks are set back at its context of 64 positions."""
    return tiny("llama", layers=2, **{"max_position_embeddings": 64, **settings})


@contextlib.contextmanager
def counted(model: PreTrainedModel) -> Iterator[list[int]]:
    """Inside, the columns of each forward of the model; the forwards of the probe are not counted."""
    forwards: list[int] = []

    def note(_module: Any, args: Any, given: dict[str, Any]) -> None:
        if any(isinstance(value, SinkCache) for value in given.values()):
            forwards.append((given["input_ids"] if "input_ids" in given else args[0]).shape[1])

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield forwards
    finally:
        handle.remove()


Call = tuple[torch.Tensor, list[int]]
"""The prompt of a call, ids [1, columns], and the columns of its forwards."""


class Replay:
    """Calls by hand: forwards of so many columns on one fresh cache, which goes on where the calls before are the same.

    Args:
        model: of the calls.
    """

    def __init__(self, model: PreTrainedModel):
        self._model, self._calls = model, []
        self._cache: SinkCache | None = None

    @torch.no_grad()
    def text(self, calls: Sequence[Call], **sizes: Any) -> torch.Tensor:
        """That of the last call. Each prompt begins with all that the forwards before it have read."""
        if self._cache is None or not self._calls or self._calls != [forwards for _, forwards in calls[:-1]]:
            self._cache = SinkCache(**{"window_length": W, "num_sink_tokens": S, **sizes}, model=self._model)
            self._calls = []
        for text, forwards in calls[len(self._calls) :]:
            made = text
            for columns in forwards:
                made = self._forward(made, columns)
            self._calls.append(list(forwards))
        return made

    def _forward(self, text: torch.Tensor, columns: int) -> torch.Tensor:
        start = self._cache.get_seq_length()
        logits = self._model(text[:, start : start + columns], past_key_values=self._cache, logits_to_keep=1).logits
        is_last = start + columns == text.shape[1]
        return torch.cat((text, logits[:, -1].argmax(-1, keepdim=True)), dim=1) if is_last else text


@dataclass
class Talk:
    """One talk: its calls so far.

    Args:
        model: on whose forwards a hook of `counted` writes into `forwards`.
        asked: arguments of `generate`.
        calls: those that went on in each other, for `replayed`.
        others: talks whose streams this one may go on in.
    """

    model: PreTrainedModel
    forwards: list[int]
    asked: dict[str, Any] = field(default_factory=lambda: {**SINK, "keep_streams": 8, "do_sample": False})
    calls: list[Call] = field(default_factory=list)
    others: Sequence[Talk] = ()

    def __post_init__(self) -> None:
        self._replay = Replay(self.model)

    def ask(self, prompt: torch.Tensor, new: int, **asked: Any) -> tuple[torch.Tensor, int]:
        """The text after a prompt, and how many tokens of the prompt were read for it."""
        self.forwards.clear()
        text = self.model.generate(prompt, max_new_tokens=new, **{**self.asked, **asked})
        made = text.shape[1] - prompt.shape[1]
        read = sum(self.forwards) - (made - 1)
        self._note(prompt, prompt.shape[1] - read)
        return text, read

    def replayed(self, **sizes: Any) -> torch.Tensor:
        """The text of the newest call, by hand."""
        return self._replay.text(self.calls, **sizes)

    def _note(self, prompt: torch.Tensor, known: int) -> None:
        """Of the calls before, keep the forwards that brought what was known; they end where a forward ended."""
        cuts = (_cut(calls, prompt, known) for calls in (self.calls, *(other.calls for other in self.others)))
        found = next((calls for calls in cuts if calls is not None), None)
        assert found is not None, f"no talk has read the first {known} tokens by themselves"
        self.calls = [*found, (prompt, list(self.forwards))]


def _cut(calls: Sequence[Call], prompt: torch.Tensor, known: int) -> list[Call] | None:
    """The forwards of some calls that read the first tokens of a prompt, so many; None: there are none."""
    cut, seen = [], 0
    for text, forwards in calls:
        kept = []
        for columns in forwards:
            if seen < known:
                kept.append(columns)
                seen += columns
        if kept:
            cut.append((text, kept))
            both = min(text.shape[1], seen, known)
            if not torch.equal(text[:, :both], prompt[:, :both]):
                return None
    return cut if seen == known else None
