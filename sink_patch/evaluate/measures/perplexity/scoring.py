"""Ways to read a long text, scored on the same positions.

A score is the negative log-likelihood, in nats, of token p + 1 after the model has read token p, at chosen positions p.
All ways but the dense one see W tokens at such a position, token p counted in, so that scores compare one by one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sink_patch
from sink_patch.evaluate.measures.forwards import Forwards
from sink_patch.evaluate.measures.memory import cache_bytes

_WINDOWS_AT_ONCE = 4


@dataclass(frozen=True, eq=False)
class Reading:
    """What is read, and where it is scored.

    Args:
        model: a causal language model of transformers.
        ids: token ids, shape [tokens].
        positions: rising, from `window_length` on, the last one below tokens - 1.
        window_length: tokens seen at each position.
    """

    model: Any
    ids: torch.Tensor
    positions: range
    window_length: int

    @cached_property
    def forward(self) -> Forwards:
        """Forwards of the model."""
        return Forwards(self.model)

    def scored(self, start: int, stop: int) -> list[int]:
        """The positions from `start` to below `stop` that are scored."""
        return [position for position in range(start, stop) if position in self.positions]

    def score(self, logits: torch.Tensor, positions: list[int]) -> torch.Tensor:
        """Scores [positions] from logits [positions, vocabulary]."""
        targets = self.ids[[position + 1 for position in positions]]
        return nn.functional.cross_entropy(logits.float(), targets, reduction="none")


class Way(ABC):
    """A way to read a text, from its beginning on, piece after piece.

    Args:
        reading: what is read.

    `step` is how many tokens a piece has. The first piece is the first window, which is not scored.
    """

    step = 256

    def __init__(self, reading: Reading):
        self.reading = reading

    @abstractmethod
    def read(self, start: int, stop: int) -> torch.Tensor:
        """Read the tokens from `start`, where the piece before has ended, to `stop`; scores [scored positions]."""

    def save(self, path: Path) -> bool:
        """Write what `resume` needs to go on; False: it needs nothing."""
        del path
        return False

    def resume(self, path: Path | None, start: int) -> None:
        """Go on at token `start`, with the file that `save` has written there."""
        del path, start

    def piece(self, start: int, end: int) -> int:
        """Where the piece that begins at `start` ends."""
        return min(start + self.step if start else self.reading.window_length, end)


class Streamed(Way):
    """With a `SinkCache`: the first window in one forward, then token by token.

    Raises:
        SinkArgumentError: impossible sizes.
        UnsupportedModelError: the model cannot stream.
    """

    step = 32

    def __init__(self, reading: Reading, num_sink_tokens: int):
        super().__init__(reading)
        self._cache = sink_patch.SinkCache(reading.window_length, num_sink_tokens, model=reading.model)

    def read(self, start: int, stop: int) -> torch.Tensor:
        one, scores = self.reading, [torch.empty(0)]
        size = stop if start == 0 else 1
        for position in range(start, stop, size):
            wanted = one.scored(position, position + size)
            ids = one.ids[None, position : position + size]  # [1, size]
            logits, _ = one.forward(ids, [each - position for each in wanted], self._cache)
            if wanted:
                scores.append(one.score(logits[0], wanted))
        return torch.cat(scores)

    def save(self, path: Path) -> bool:
        self._cache.save(path)
        return True

    def resume(self, path: Path | None, start: int) -> None:
        del start
        if path is not None:
            self._cache = sink_patch.SinkCache.load(path, model=self.reading.model)


class Recomputed(Way):
    """A separate forward without cache over the newest W tokens, for each scored position: slow, exact.

    Args:
        reading: what is read.
        bos: token that replaces the oldest one of each window, for a model whose texts always begin with it.
    """

    def __init__(self, reading: Reading, bos: int | None = None):
        super().__init__(reading)
        self._bos = bos
        self.step = _WINDOWS_AT_ONCE * reading.positions.step

    def read(self, start: int, stop: int) -> torch.Tensor:
        one = self.reading
        positions = one.scored(start, stop)
        if not positions:
            return torch.empty(0)
        windows = torch.stack([one.ids[p + 1 - one.window_length : p + 1] for p in positions])  # [positions, W]
        if self._bos is not None:
            windows[:, 0] = self._bos
        logits, _ = one.forward(windows, [one.window_length - 1], use_cache=False)
        return one.score(logits[:, 0], positions)


class Dense(Way):
    """With the cache that the model makes for itself, which forgets nothing and grows with the text.

    It is too large to be saved: a run that goes on reads the text again, without scores.
    """

    _cache: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes of the cache."""
        return cache_bytes(self._cache)

    def read(self, start: int, stop: int) -> torch.Tensor:
        one, wanted = self.reading, self.reading.scored(start, stop)
        ids = one.ids[None, start:stop]  # [1, piece]
        logits, self._cache = one.forward(ids, [each - start for each in wanted], self._cache, use_cache=True)
        return one.score(logits[0], wanted) if wanted else torch.empty(0)

    def resume(self, path: Path | None, start: int) -> None:
        del path
        one, done = self.reading, 0
        while done < start:
            stop = self.piece(done, start)
            _, self._cache = one.forward(one.ids[None, done:stop], [], self._cache, use_cache=True)
            done = stop
