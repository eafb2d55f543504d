"""Memory and blocks of continuous batching with sinks: `python -m tests.bench.batching_memory [--tokens 100000]`.

A random Llama of one layer with attention far from uniform, a window of 64, a context of 256, 8 requests at once.
"endless": the same 8 from the beginning to the end. "come and go": prompts of up to three windows, texts of up to six,
and a new one where one ends.
After each 10,000 tokens: memory of the process, blocks that a request holds at most, blocks that are taken in all, and
whether the newest token of each request is that of a fresh forward over what it sees (tests/support/oracle.py). Each
way is run in a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from tests.bench import records
from tests.bench.forever import SINKS, WINDOW, resident_megabytes
from tests.support.oracle import visible_tokens
from tests.support.tiny import tiny

PAGE, REQUESTS, STRETCH, EVER = 16, 8, 10_000, 10**9
WAYS = ("endless", "come and go")


def make_model() -> Any:
    """Its attention is far from uniform, so that a wrong key is seen in the next token."""
    made = tiny("llama", layers=1, attention="sdpa", max_position_embeddings=4 * WINDOW, tie_word_embeddings=False)
    return copy.deepcopy(made)


class Crowd:
    """8 requests to one manager, which is driven batch by batch."""

    def __init__(self, model: Any, way: str):
        from transformers import ContinuousBatchingConfig  # here: older versions have none

        config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        config.cache_implementation = "sink"
        config.cache_config = {"window_length": WINDOW, "num_sink_tokens": SINKS}
        config.prefill_chunk_size = WINDOW - SINKS
        blocks = REQUESTS * -(-WINDOW // PAGE)
        sizes = ContinuousBatchingConfig(page_size=PAGE, num_blocks=blocks, max_batch_tokens=256, safety_margin=0.0)
        self._way, self._random = way, torch.Generator().manual_seed(0)
        self._model, self.fresh = model, copy.deepcopy(model)
        self._manager = model.init_continuous_batching(config, sizes)
        self._manager.batch_processor = self._processor = self._manager._create_batch_processor()
        self.ended = 0
        for _ in range(REQUESTS):
            self._add()

    def _add(self) -> None:
        length, new = 3 * WINDOW, EVER
        if self._way != "endless":
            length, new = (int(torch.randint(1, most, (), generator=self._random)) for most in (length, 6 * WINDOW))
        ids = torch.randint(97, (length,), generator=self._random).tolist()
        self._manager.add_request(ids, max_new_tokens=new)

    def step(self) -> int:
        """One batch; the number of tokens that it has generated."""
        self._processor.prepare_next_batch()
        new = sum(one.has_new_token for one in self._processor.inputs_and_outputs.requests_in_batch)
        self._manager._generation_step()
        self._processor.update_batch()
        queue = self._manager.output_router.output_queue
        while not queue.empty():
            result = queue.get()
            assert result.error is None, result.error
            self.ended += 1
            self._add()
        return new

    @property
    def blocks(self) -> list[int]:
        """That each request holds."""
        return [
            len(table) for one in self._processor.cache.cache_allocators.values() for table in one.block_table.values()
        ]

    def states(self) -> Iterator[Any]:
        """Of requests that decode."""
        for state in self._processor.scheduler.active_requests.values():
            if state.generated_tokens:
                yield state

    @torch.no_grad()
    def wrong(self) -> int:
        """How many requests have another newest token than a fresh forward over what they see gives."""
        found = 0
        for state in self.states():
            text = torch.tensor([[*state.initial_tokens, *state.generated_tokens]])
            seen = visible_tokens(text[:, :-1], text.shape[1] - 2, 1, WINDOW, SINKS)
            if len(state.generated_tokens) > 1:
                found += int(self.fresh(seen).logits[0, -1].argmax()) != int(text[0, -1])
        return found


def run(way: str, tokens: int) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    crowd, rows, done, most = Crowd(make_model(), way), list[dict[str, Any]](), 0, 0
    with torch.inference_mode():
        while done < tokens:
            start, goal = time.perf_counter(), done + STRETCH
            before = done
            while done < goal:
                done += crowd.step()
                most = max([most, *crowd.blocks])
            spent = time.perf_counter() - start
            rows.append(
                {
                    "tokens": done,
                    "resident_mb": round(resident_megabytes(), 2),
                    "most_blocks_of_a_request": most,
                    "blocks_in_all": sum(crowd.blocks),
                    "requests_ended": crowd.ended,
                    "wrong": crowd.wrong(),
                    "tokens_a_second": round((done - before) / spent),
                }
            )
            print(way, *(f"{name} {value}" for name, value in rows[-1].items()), sep="  ", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000, help="in all, each way (%(default)s)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = {}
    for way in WAYS:
        with multiprocessing.get_context("spawn").Pool(1) as process:
            found[way] = process.apply(run, (way, arguments.tokens))
    sizes = {"window_length": WINDOW, "num_sink_tokens": SINKS, "page_size": PAGE, "requests": REQUESTS}
    records.write(arguments.json, **sizes, tokens=arguments.tokens, rows=found)


if __name__ == "__main__":
    main()
