"""Peak memory while decoding: `python -m tests.bench.memory [--model NAME] [--window 256] [--json PATH]`.

Peak memory beside the model's weights while 20 tokens are decoded after `--tokens` tokens of context: with our cache,
with a DynamicCache, and with a sliding window with recomputation. On a CPU it is the peak of the process (VmHWM, which
Linux can reset), each in a new process; on a GPU it is what torch has allocated.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

import sink_patch
from sink_patch.models.entries import cache_argument
from tests.bench import models, records
from tests.bench.decode import SINKS

PEERS = ("ours", "dynamic", "recomputed")
DECODED = 20


def peak_megabytes(device: str) -> float:
    """Peak memory since `reset_peak`, in MB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 / 1e6


def reset_peak(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # returns free memory to the system
        Path("/proc/self/clear_refs").write_text("5")


def make_step(peer: str, model: Any, window: int, tokens: int) -> Callable[[], Any]:
    """A function that decodes a token after `tokens` others."""
    text = torch.randint(1000, (1, tokens), generator=torch.Generator().manual_seed(0)).to(model.device)
    if peer == "recomputed":
        return lambda: model(text[:, -window:], use_cache=False, logits_to_keep=1)
    cache = sink_patch.SinkCache(window, SINKS, model=model) if peer == "ours" else DynamicCache(config=model.config)
    for piece in text.split(window - SINKS, dim=1):
        model(piece, **{cache_argument(model): cache}, logits_to_keep=1)
    return lambda: model(text[:, :1], **{cache_argument(model): cache})


@torch.no_grad()
def run(peer: str, model: Any, window: int, tokens: int) -> float:
    """Peak memory beside the weights, in MB."""
    device = model.device.type
    model(torch.tensor([[7]], device=device), use_cache=False)
    reset_peak(device)
    before = peak_megabytes(device)
    step = make_step(peer, model, window, tokens)
    reset_peak(device)
    for _ in range(DECODED):
        step()
    return round(peak_megabytes(device) - before, 1)


def run_in_this_process(peer: str, arguments: argparse.Namespace) -> float:
    torch.set_num_threads(1)
    _, model = models.load(arguments)
    return run(peer, model, arguments.window, arguments.tokens)


def main() -> None:
    parser = models.parser(__doc__)
    parser.add_argument("--tokens", type=int, default=10_000)
    arguments = parser.parse_args()
    about, model = models.load(arguments)
    found = {}
    for peer in PEERS:
        if arguments.device == "cuda":
            found[peer] = run(peer, model, arguments.window, arguments.tokens)
        else:
            with multiprocessing.get_context("spawn").Pool(1) as process:
                found[peer] = process.apply(run_in_this_process, (peer, arguments))
        print(f"{peer:>12} {found[peer]:>10} MB", flush=True)
    records.write(arguments.json, **about, tokens=arguments.tokens, peak_mb_over_the_weights=found)


if __name__ == "__main__":
    main()
