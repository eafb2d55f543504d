"""Many requests at once: `python -m tests.bench.batching [--model NAME] [--window N] [--requests N]`.

Decoding alone, in rounds of one token for each request, one way after the other in each round, so that all see the same
machine: requests one by one over sink caches; continuous batching with sinks, windows full; and transformers' own
continuous batching at a context of one window and of ten. Printed are tokens a second, the ratios (medians over the
rounds), and the pages that the requests hold. All ways decode greedily, from random prompts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig

from sink_patch import SinkCache
from sink_patch.models.entries import cache_argument
from tests.bench import models, records

PAGE, SINKS, WARM = 32, 4, 3


def main() -> None:
    parser = models.parser(__doc__)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    entries, model = models.load(arguments)
    model.set_attn_implementation("sdpa")
    with torch.inference_mode():
        figures = run(model, arguments)
    for name, found in figures.items():
        print(f"{name}: {found}")
    records.write(arguments.json, **entries, requests=arguments.requests, rounds=arguments.rounds, figures=figures)


def run(model: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of each way, ratios to continuous batching with sinks, and bytes of pages."""
    window, rounds, requests = arguments.window, arguments.rounds, arguments.requests
    managers = {
        "with sinks": Batching(model, requests, 2 * window, rounds, window),
        "transformers, one window": Batching(model, requests, window - rounds // 2, rounds, None),
        "transformers, ten windows": Batching(model, requests, 10 * window - rounds // 2, rounds, None),
    }
    ways: dict[str, Callable[[], Any]] = {"one by one": one_by_one(model, requests, window)}
    ways |= {name: manager.step for name, manager in managers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(WARM + rounds):
        for name, step in ways.items():
            start = time.perf_counter()
            step()
            if number >= WARM:
                seconds[name].append(time.perf_counter() - start)
    ours = seconds["with sinks"]
    return {
        "tokens a second": {name: round(requests / statistics.median(found), 1) for name, found in seconds.items()},
        "times as fast with sinks as": {
            name: round(statistics.median(a / b for a, b in zip(found, ours, strict=True)), 3)
            for name, found in seconds.items()
            if found is not ours
        },
        "bytes of pages": {name: manager.nbytes for name, manager in managers.items()},
    }


def prompt(model: Any, length: int, seed: int) -> torch.Tensor:
    """Random ids [1, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, model.config.vocab_size, (1, length), generator=generator)


def one_by_one(model: Any, requests: int, window: int) -> Callable[[], None]:
    """One forward of a token for each request, whose windows are full."""
    name = cache_argument(model)
    caches = [SinkCache(window, SINKS, model=model) for _ in range(requests)]
    for index, cache in enumerate(caches):
        model(prompt(model, 2 * window, index), logits_to_keep=1, **{name: cache})
    token = prompt(model, 1, 0)

    def step() -> None:
        for cache in caches:
            model(token, **{name: cache}).logits[:, -1].argmax(-1)

    return step


class Batching:
    """A manager whose requests have all been read; it is driven batch by batch.

    Args:
        length: tokens of each prompt.
        window: with sinks; None: transformers' own.
    """

    def __init__(self, model: Any, requests: int, length: int, rounds: int, window: int | None):
        config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        if window is not None:
            config.cache_implementation = "sink"
            config.cache_config = {"window_length": window, "num_sink_tokens": SINKS}
            config.prefill_chunk_size = window - SINKS
        held = length + requests + rounds + WARM + 2 if window is None else window
        from transformers import ContinuousBatchingConfig  # here: older versions have none

        sizes = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=requests * (-(-held // PAGE)) + 8,
            max_batch_tokens=length + requests,  # a prompt in each batch
            allow_block_sharing=False,
            safety_margin=0.0,
        )
        self._manager = model.init_continuous_batching(config, sizes)
        self._manager.batch_processor = self._processor = self._manager._create_batch_processor()
        for index in range(requests):
            self._manager.add_request(prompt(model, length, index)[0].tolist(), max_new_tokens=10**6)
        while len(self._decoding()) < requests:
            self.step()

    def step(self) -> None:
        """One batch."""
        self._processor.prepare_next_batch()
        self._manager._generation_step()
        self._processor.update_batch()

    @property
    def nbytes(self) -> int:
        """Of the pages that requests hold."""
        allocators = self._processor.cache.cache_allocators.values()
        return sum(len(blocks) * one.bytes_per_block for one in allocators for blocks in one.block_table.values())

    def _decoding(self) -> list[Any]:
        states = self._processor.scheduler.active_requests.values()
        return [state for state in states if state.generated_tokens]


if __name__ == "__main__":
    main()
