"""Tokens per second of a model: `python -m tests.bench.decode [--model NAME] [--window 256] [--json PATH]`.

The model (tests/bench/models.py) decodes one row, in float32 on one core of a CPU, or on `--device cuda` in `--dtype
bfloat16`. These are compared, in blocks of tokens that are interleaved in one process:

* our cache after W, 1,000, 10,000 and 100,000 tokens, which were fed in pieces, and our cache in compiled decoding
  (with CUDA graphs on a GPU; not with `--no-compile`);
* transformers' DynamicCache at a context of W, and its StaticCache of length W, compiled;
* a sliding window with recomputation: a forward over the newest W tokens for each token.

Figures are medians; ratios are those of neighbouring blocks.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, StaticCache

import sink_patch
from sink_patch.models.entries import cache_argument
from tests.bench import models, records

SINKS, WARM = 4, 5
POINTS = (1_000, 10_000, 100_000)
RATIOS = (
    ("ours", "dynamic", "a DynamicCache at a context of W"),
    ("ours compiled", "static compiled", "a compiled StaticCache of length W"),
    ("ours", "recomputed", "a window with recomputation"),
)


class Bench:
    """The peers of one model; each is a function that decodes a token.

    Those whose caches grow are taken back to where they were behind each block, when its time is told.

    Args:
        block: tokens of a block.
    """

    def __init__(self, model: Any, window: int, *, compiled: bool, block: int = 5):
        self.model, self.window, self.block = model, window, max(block, WARM)
        self.growing: dict[str, Any] = {}  # caches
        self.name = cache_argument(model)  # with the old name, each forward warns
        self.token = torch.tensor([[7]], device=model.device)
        mode = "reduce-overhead" if model.device.type == "cuda" else None
        self.compiled = torch.compile(model.forward, dynamic=False, mode=mode) if compiled else None
        self.peers: dict[str, Callable[[], Any]] = {}

    def add_ours(self, longest: int) -> None:
        cache, text = sink_patch.SinkCache(self.window, SINKS, model=self.model), self._text(longest)
        fed, piece = 0, self.window - SINKS
        for point in (self.window, *(point for point in POINTS if self.window < point <= longest)):
            while fed < point:
                new = text[:, fed : min(fed + (piece if fed else self.window), point)]
                self.model(new, **{self.name: cache}, logits_to_keep=1)
                fed += new.shape[1]
            self._add_cache("ours" if point == self.window else f"ours after {point}", cache.clone())
        if self.compiled is not None:
            self._add_cache("ours compiled", cache.clone(), compiled=True)

    def add_others(self) -> None:
        text = self._text(self.window)
        grown = self.growing["dynamic"] = DynamicCache(config=self.model.config)
        before = self.window - self.block // 2  # so that its tokens see a window, on the average
        self.model(text[:, :before], **{self.name: grown}, logits_to_keep=1)
        self.peers["dynamic"] = lambda: self.model(self.token, **{self.name: grown})
        self.peers["recomputed"] = lambda: self.model(text, use_cache=False, logits_to_keep=1)
        if self.compiled is not None:
            self._add_static(text)

    def _add_static(self, text: torch.Tensor) -> None:
        cache = StaticCache(config=self.model.config, max_cache_len=self.window)
        self.growing["static compiled"] = cache
        self.model(text[:, : self.window - self.block], **{self.name: cache}, logits_to_keep=1)
        mask = torch.ones(1, self.window, dtype=torch.long, device=self.model.device)
        position_ids = torch.tensor([[self.window - 1]], device=self.model.device)

        def static() -> None:
            self._forward(self.token, **{self.name: cache}, attention_mask=mask, position_ids=position_ids)

        self.peers["static compiled"] = static

    def _add_cache(self, name: str, cache: sink_patch.SinkCache, *, compiled: bool = False) -> None:
        forward = self._forward if compiled else self.model
        self.peers[name] = lambda: forward(self.token, **{self.name: cache})

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """A forward through the graph, as after `model.forward = torch.compile(model.forward)`."""
        self.model.forward = self.compiled
        try:
            return self.model(*args, **kwargs)
        finally:
            del self.model.forward

    def _text(self, count: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(1000, (1, count), generator=generator).to(self.model.device)

    def seconds(self, name: str, count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            self.peers[name]()
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        took = time.perf_counter() - start
        if (grown := self.growing.get(name)) is not None:
            grown.crop(-count)
        return took / count


@torch.no_grad()
def run(bench: Bench, longest: int, rounds: int, block: int) -> dict[str, Any]:
    bench.add_ours(longest)
    bench.add_others()
    for name in bench.peers:
        bench.seconds(name, WARM)
    found: dict[str, list[float]] = {name: [] for name in bench.peers}
    for number in range(rounds):
        first = number % len(bench.peers)  # so that each one follows each other one
        for name in [*bench.peers, *bench.peers][first : first + len(bench.peers)]:
            if name != "recomputed" or number < 5:
                found[name].append(bench.seconds(name, 1 if name == "recomputed" else block))
    result = {"tokens_a_second": {name: round(1 / statistics.median(times), 2) for name, times in found.items()}}
    result["speed"] = {
        f"{one} against {words}": ratio(found, one, other) for one, other, words in RATIOS if one in found
    }
    for name in found:
        if name.startswith("ours after"):
            result["speed"][f"{name} tokens against after {bench.window}"] = ratio(found, name, "ours")
    return result


def ratio(found: dict[str, list[float]], one: str, other: str) -> float:
    """How many times as fast `one` is as `other`."""
    return round(statistics.median(b / a for a, b in zip(found[one], found[other], strict=False)), 3)


def main() -> None:
    parser = models.parser(__doc__)
    parser.add_argument("--longest", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--block", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    about, model = models.load(arguments)
    bench = Bench(model, arguments.window, compiled=not arguments.no_compile, block=arguments.block)
    figures = run(bench, arguments.longest, arguments.rounds, arguments.block)
    print(json.dumps(figures, indent=1))
    records.write(arguments.json, **about, **figures)


if __name__ == "__main__":
    main()
