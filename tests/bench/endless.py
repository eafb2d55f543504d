"""A million tokens of `sink_patch.stream`: `python -m tests.bench.endless [--tokens 1000000] [--json PATH]`.

A random Llama of one layer, a window of 64, sampling and a repetition penalty. Time a token and memory of the process,
stretch by stretch; each block of 500 tokens is followed by 100 tokens of a second, young stream, which is begun anew
with each stretch: the ratio of the two does not depend on the load of the machine.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import sink_patch
from tests.bench import records
from tests.bench.forever import SINKS, WINDOW, make_model, resident_megabytes
from tests.support.tokenizer import tiny_tokenizer

STRETCH, BLOCK, YOUNG = 20_000, 500, 100
ASKED = {
    "window_length": WINDOW,
    "num_sink_tokens": SINKS,
    "do_sample": True,
    "temperature": 0.9,
    "top_k": 50,
    "repetition_penalty": 1.1,
}


def begin(model: torch.nn.Module) -> Iterator[str]:
    """A stream whose window is full."""
    begun = sink_patch.stream(model, tiny_tokenizer(), "word1 word2 word3", **ASKED)
    timed(begun, WINDOW)
    return begun


def timed(pieces: Iterator[str], count: int) -> float:
    """Milliseconds a token."""
    start = time.perf_counter()
    for _ in itertools.islice(pieces, count):
        pass
    return 1000 * (time.perf_counter() - start) / count


def run(tokens: int) -> list[dict[str, float]]:
    model, rows = make_model(), []
    long = begin(model)
    for seen in range(STRETCH, tokens + 1, STRETCH):
        young = begin(model)
        pairs = [(timed(long, BLOCK), timed(young, YOUNG)) for _ in range(STRETCH // BLOCK)]
        del young
        rows.append(
            {
                "tokens": seen,
                "ms_a_token": round(statistics.median(old for old, _ in pairs), 4),
                "against_a_young_stream": round(statistics.median(old / new for old, new in pairs), 3),
                "resident_mb": round(resident_megabytes(), 2),
            }
        )
        print("  ".join(f"{name} {value:>9}" for name, value in rows[-1].items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    records.write(arguments.json, window_length=WINDOW, num_sink_tokens=SINKS, rows=run(arguments.tokens))


if __name__ == "__main__":
    main()
