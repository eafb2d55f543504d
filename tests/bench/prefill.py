"""Peak memory while a long prompt is fed: `python -m tests.bench.prefill [--windows 50] [--json PATH]`.

A random Llama (4 layers, hidden 256) reads a prompt of 50 windows of 256, once in pieces of `window_length -
num_sink_tokens` and once in a single forward, each in a new process. Peak memory is that of the process, minus
its peak before the prompt; it is read after each window, or after each forward if that is longer.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import sys
import time
from pathlib import Path

import torch
import transformers

import sink_patch
from tests.bench.stream import WINDOW, make_model

SINKS = 4


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@torch.inference_mode()
def run(windows: int, size: int) -> list[dict[str, float]]:
    """One row for each window, or for each forward if it is longer."""
    torch.set_num_threads(1)
    model = make_model()
    model(torch.randint(1000, (1, WINDOW)), past_key_values=sink_patch.SinkCache(WINDOW, SINKS, model=model))
    prompt, cache, rows = torch.randint(1000, (1, windows * WINDOW)), sink_patch.SinkCache(WINDOW, SINKS), []
    cache.bind(model)
    before, start = peak_mb(), time.perf_counter()
    for piece in prompt.split(size, dim=1):
        model(piece, past_key_values=cache, logits_to_keep=1)
        seen = cache.get_seq_length()
        if len(rows) < seen // WINDOW:
            rows.append(
                {
                    "tokens": seen,
                    "seconds": round(time.perf_counter() - start, 2),
                    "cache_mb": round(cache.nbytes / 1e6, 3),
                    "peak_mb_over_the_model": round(peak_mb() - before, 1),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=50)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = {}
    for name, size in (("in pieces", WINDOW - SINKS), ("in one forward", arguments.windows * WINDOW)):
        with multiprocessing.get_context("spawn").Pool(1) as process:
            found[name] = process.apply(run, (arguments.windows, size))
        print(name)
        for row in found[name]:
            print("  ".join(f"{key} {value:>9}" for key, value in row.items()), flush=True)
    if arguments.json is not None:
        versions = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        record = {"window_length": WINDOW, "machine": platform.machine(), "threads": 1, **versions, **found}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
