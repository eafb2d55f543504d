"""Memory and time a token over the length of a stream."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

import sink_patch
from sink_patch.evaluate.measures import records
from sink_patch.evaluate.measures.cost.figures import ROUNDS, Plan
from sink_patch.evaluate.measures.forwards import Forwards
from sink_patch.evaluate.measures.memory import cache_bytes, process_bytes
from sink_patch.evaluate.measures.records import Record
from sink_patch.evaluate.models import Loaded

MEASURE = "cost"
_SEED = 0


@dataclass
class _Stream:
    """A stream that is read on and on; `cache` None: the model makes its own with the first tokens."""

    forward: Forwards
    ids: torch.Tensor  # [1, tokens]
    piece: int
    cache: Any = None
    read: int = 0

    def go_to(self, tokens: int, bar: tqdm[Any]) -> None:
        """Read on in pieces."""
        while self.read < tokens:
            bar.update(self._next(min(self.piece, tokens - self.read)))

    def block(self, tokens: int) -> float:
        """Read so many single tokens; milliseconds a token."""
        started = time.perf_counter()
        for _ in range(tokens):
            self._next(1)
        return (time.perf_counter() - started) * 1000 / tokens

    def _next(self, tokens: int) -> int:
        ids = self.ids[:, self.read : self.read + tokens]  # [1, tokens]
        _, returned = self.forward(ids, [tokens - 1], self.cache, use_cache=True)
        self.cache = returned if self.cache is None else self.cache
        self.read += tokens
        return tokens


def measure(loaded: Loaded, plan: Plan) -> Record:
    """The record: both caches after each length, with a progress bar on stderr.

    Memory of the process is that of a stream which has the process for itself: the sink cache goes alone first. In the
    second pass a sink cache, which is small and does not grow, goes along with the dense one to take turns with it.

    Raises:
        SinkArgumentError: impossible sizes.
        UnsupportedModelError: the model cannot stream.
    """
    lengths = [windows * plan.window_length for windows in plan.windows]
    total = lengths[-1] + ROUNDS * plan.block
    generator = torch.Generator().manual_seed(_SEED)
    vocabulary = loaded.model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (1, total), generator=generator)
    with torch.inference_mode(), tqdm(total=lengths[-1] + 2 * total, desc="cost", unit="token") as bar:
        rows = _rows(Forwards(loaded.model), ids, plan, lengths, bar)
    return {
        "measure": MEASURE,
        **records.about(loaded),
        "window_length": plan.window_length,
        "num_sink_tokens": plan.num_sink_tokens,
        "tokens": lengths,
        "block_tokens": plan.block,
        "rounds": ROUNDS,
        "rows": [{"name": name, **row} for name, row in rows.items()],
    }


def _rows(
    forward: Forwards, ids: torch.Tensor, plan: Plan, lengths: list[int], bar: tqdm[Any]
) -> dict[str, dict[str, list[Any]]]:
    """Figures of both caches, each a list over the lengths; ids [1, tokens]."""
    piece = plan.window_length - plan.num_sink_tokens

    def streamed() -> _Stream:
        cache = sink_patch.SinkCache(plan.window_length, plan.num_sink_tokens, model=forward.model)
        return _Stream(forward, ids, piece, cache)

    alone, alone_bytes = streamed(), []
    for tokens in lengths:
        alone.go_to(tokens, bar)
        alone_bytes.append(process_bytes())
    del alone
    streams = {"dense": _Stream(forward, ids, piece), "sinks": streamed()}
    rows: dict[str, dict[str, list[Any]]] = {name: {} for name in streams}
    for place, tokens in enumerate(lengths):
        for name, row in _at(streams, tokens, plan.block, bar).items():
            row["process_bytes"] = process_bytes() if name == "dense" else alone_bytes[place]
            for key, value in row.items():
                rows[name].setdefault(key, []).append(value)
    return rows


def _at(streams: dict[str, _Stream], tokens: int, block: int, bar: tqdm[Any]) -> dict[str, dict[str, Any]]:
    """Figures of each stream after so many tokens: the median over blocks which take turns."""
    for stream in streams.values():
        stream.go_to(tokens, bar)
    held = {name: cache_bytes(stream.cache) for name, stream in streams.items()}
    times: dict[str, list[float]] = {name: [] for name in streams}
    for _ in range(ROUNDS):
        for name, stream in streams.items():
            times[name].append(stream.block(block))
            bar.update(block)
    return {
        name: {"ms_a_token": round(statistics.median(times[name]), 3), "cache_bytes": held[name]} for name in streams
    }
