"""By which forwards a stream may have come to where it is: calls that broke off leave more than one answer."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from sink_patch import SinkCache
from tests.kept.talk import S, W

Forwards = list[torch.Tensor]
"""The ids of each forward of a stream, [1, columns] each."""


def columns_of(forwards: Sequence[torch.Tensor]) -> int:
    return sum(ids.shape[1] for ids in forwards)


@torch.no_grad()
def replayed(model: PreTrainedModel, forwards: Forwards, prompt: torch.Tensor, new: int) -> torch.Tensor:
    """The text after a prompt that came by some forwards, with so many new tokens."""
    cache, text = SinkCache(W, S, model=model), prompt
    for ids in forwards:
        logits = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]
    for _ in range(new - 1):
        text = torch.cat((text, logits.argmax(-1, keepdim=True)), dim=1)
        logits = model(text[:, -1:], past_key_values=cache, logits_to_keep=1).logits[:, -1]
    return torch.cat((text, logits.argmax(-1, keepdim=True)), dim=1)


class Lineages:
    """The forwards of streams that may still be kept: those of the newest calls."""

    def __init__(self) -> None:
        self._all: deque[Forwards] = deque(maxlen=100)

    def add(self, prompt: torch.Tensor, known: int, forwards: Forwards) -> None:
        """A call has read a prompt [1, columns] by some forwards, but for its first tokens, which were known."""
        self._all += [[*before, *forwards] for before in self.beginnings(prompt, known)]

    def beginnings(self, prompt: torch.Tensor, known: int) -> list[Forwards]:
        """The forwards by which so many tokens of a prompt may have been read before, once each."""
        found: dict[tuple[int, ...], Forwards] = {}
        for lineage in (*reversed(self._all), []):
            cut, seen = [], 0
            for ids in lineage:
                if seen < known:
                    cut.append(ids[:, : known - seen])
                    seen += ids.shape[1]
            if seen > known and seen > W:
                continue  # nothing can be taken back there
            if known <= seen and torch.equal(torch.cat([prompt[:, :0], *cut], dim=1), prompt[:, :known]):
                found[tuple(ids.shape[1] for ids in cut)] = cut
        return list(found.values())
