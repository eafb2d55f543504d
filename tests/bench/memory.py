"""Peak memory while decoding: `python -m tests.bench.memory [--model NAME] [--window 256] [--json PATH]`.

For each peer what the device holds at most, over the model's weights, while it decodes 20 tokens after `--tokens` of
context: ours, a DynamicCache that keeps everything, and a sliding window with recomputation. On a CPU it is what the
process holds at most (VmHWM, which Linux can set back), each peer in a process of its own; on a GPU what torch has
allocated.
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


def held_at_most(device: str) -> float:
    """MB since `forget_peak`."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 / 1e6


def forget_peak(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system
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
    """MB over the weights."""
    device = model.device.type
    model(torch.tensor([[7]], device=device), use_cache=False)
    forget_peak(device)
    before = held_at_most(device)
    step = make_step(peer, model, window, tokens)
    forget_peak(device)
    for _ in range(DECODED):
        step()
    return round(held_at_most(device) - before, 1)


def apart(peer: str, arguments: argparse.Namespace) -> float:
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
                found[peer] = process.apply(apart, (peer, arguments))
        print(f"{peer:>12} {found[peer]:>10} MB", flush=True)
    records.write(arguments.json, **about, tokens=arguments.tokens, peak_mb_over_the_weights=found)


if __name__ == "__main__":
    main()
