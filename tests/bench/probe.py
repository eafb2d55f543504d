"""Time and memory of the probe: `python -m tests.bench.probe MODEL` (a directory or hub name).

Time of the first `sink_patch.SinkCache(model=model)` (which runs the probe), of a later one (which does not) and of one
forward of one token; peak memory that the first one adds to the process.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time

import torch
from transformers import AutoModelForCausalLM

import sink_patch


def milliseconds(work) -> float:
    start = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - start)


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    with torch.inference_mode():
        token = torch.tensor([[7]])
        model(token)
        forward = statistics.median(milliseconds(lambda: model(token)) for _ in range(5))
    before = peak_megabytes()
    first = milliseconds(lambda: sink_patch.SinkCache(model=model))
    grown = peak_megabytes() - before
    again = statistics.median(milliseconds(lambda: sink_patch.SinkCache(model=model)) for _ in range(5))
    print(f"one forward of one token {forward:.1f} ms")
    print(f"first cache              {first:.1f} ms, {grown:.1f} MB more at the peak")
    print(f"later caches             {again:.1f} ms")


if __name__ == "__main__":
    main()
