"""Talks in continuous batching, with and without kept slots: `python -m tests.bench.batching_talks [--model NAME]`.

Clients at once, each of which sends its whole talk again with a new message as soon as its answer has come; ids are
random. Printed are the tokens of a prompt that were read for a turn, the seconds of all talks together, and what it
costs to see that the model is as it was.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig

from sink_patch.kept.sameness import settings_of, weights_of
from tests.bench import models, records

PAGE, SINKS, SYSTEM, MESSAGE, ANSWER = 32, 4, 200, 40, 24


def main() -> None:
    parser = models.parser(__doc__)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    entries, model = models.load(arguments)
    model.set_attn_implementation("sdpa")
    with torch.inference_mode():
        figures = run(model, arguments)
    for name, found in figures.items():
        print(f"{name}: {found}")
    sizes = {name: getattr(arguments, name) for name in ("clients", "turns", "rounds")}
    records.write(arguments.json, **entries, **sizes, figures=figures)


def run(model: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens and seconds of both ways, one after the other in each round, and the ratio of the seconds."""
    ways = {"kept": arguments.clients, "anew": 0}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    read: dict[str, float] = {}
    for _ in range(arguments.rounds):
        for name, keep in ways.items():
            talks = Talks(model, arguments, keep)
            start = time.perf_counter()
            talks.hold()
            seconds[name].append(time.perf_counter() - start)
            read[name] = round(talks.read / (arguments.clients * (arguments.turns - 1)), 1)
    start = time.perf_counter()
    weights_of(model), settings_of(model)
    return {
        "tokens of a prompt that were read, after the first turn": read,
        "seconds": {name: round(statistics.median(found), 2) for name, found in seconds.items()},
        "times as fast": round(statistics.median(b / a for a, b in zip(*seconds.values(), strict=True)), 2),
        "milliseconds to see that the model is as it was": round(1e3 * (time.perf_counter() - start), 1),
    }


@dataclass
class Client:
    """A talk: what was said so far, and the request that runs."""

    seed: int
    history: list[int] = field(default_factory=list)
    turn: int = 0
    request: str = ""


class Talks:
    """All talks over one manager, which is driven batch by batch.

    Args:
        keep: how many slots are kept.
    """

    def __init__(self, model: Any, arguments: argparse.Namespace, keep: int):
        from transformers import ContinuousBatchingConfig  # here: older versions have none

        window, self._turns = arguments.window, arguments.turns
        config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        config.cache_implementation = "sink"
        config.cache_config = {"window_length": window, "num_sink_tokens": SINKS, "keep_streams": keep}
        config.prefill_chunk_size = window - SINKS
        blocks = 2 * arguments.clients * -(-window // PAGE) + 8
        sizes = ContinuousBatchingConfig(page_size=PAGE, num_blocks=blocks, max_batch_tokens=512)
        self._manager = model.init_continuous_batching(config, sizes)
        self._manager.batch_processor = self._processor = self._manager._create_batch_processor()
        self._clients, self._vocabulary = [Client(seed) for seed in range(arguments.clients)], model.config.vocab_size
        self.read = 0

    def hold(self) -> None:
        for client in self._clients:
            self._ask(client)
        while self._processor.prepare_next_batch():
            self._note()
            self._manager._generation_step()
            self._processor.update_batch()
            while not self._manager.output_router.output_queue.empty():
                self._answered(self._manager.output_router.output_queue.get())

    def _note(self) -> None:
        """Count the tokens of prompts."""
        late = {client.request for client in self._clients if client.turn > 1}
        for one in self._processor.inputs_and_outputs.requests_in_batch:
            if one.state.request_id in late and not one.state.generated_tokens:
                self.read += one.query_length

    def _answered(self, result: Any) -> None:
        client = next(one for one in self._clients if one.request == result.request_id)
        client.history = [*result.prompt_ids, *result.generated_tokens]
        if client.turn < self._turns:
            self._ask(client)

    def _ask(self, client: Client) -> None:
        generator = torch.Generator().manual_seed(1000 * client.seed + client.turn)
        length = MESSAGE if client.turn else SYSTEM
        message = torch.randint(5, self._vocabulary, (length,), generator=generator)
        client.turn += 1
        client.request = self._manager.add_request([*client.history, *message.tolist()], max_new_tokens=ANSWER)


if __name__ == "__main__":
    main()
