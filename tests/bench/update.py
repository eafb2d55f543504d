"""Time of the cache in a decode step: `python -m tests.bench.update [--json PATH]`.

All layers of a cache (30, with 3 key-value heads of 64, as in SmolLM2-135M) take one token, without a model around it:
our cache, with its work before and after a forward; transformers' StaticCache of the same length; its DynamicCache at a
context of W; and its old SinkCache, if transformers 4.52.4 is installed. Blocks of steps of each are interleaved;
figures are medians, first as ratios to the StaticCache's step.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import sink_patch
from sink_patch.streaming.bound import streams_of
from tests.bench import records

LAYERS, HEADS, DIM, SINKS = 30, 3, 64, 4
WINDOWS = (256, 1024, 4096, 16384)
BLOCK, WARM = 20, 3
GROWING = ("dynamic", "old")  # their time grows with W, to half a second per step
Step = Callable[[], None]


def make_model(device: str) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=HEADS * DIM,
        intermediate_size=8,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=65536,
    )
    return LlamaForCausalLM(config).eval().to(device)


def states(columns: int, device: str) -> torch.Tensor:
    return torch.randn(1, HEADS, columns, DIM, device=device)


def ours(model: LlamaForCausalLM, window: int, device: str) -> Step:
    cache = sink_patch.SinkCache(window, SINKS, model=model)
    streams = streams_of(cache)

    def feed(columns: int, new: torch.Tensor) -> None:
        streams.begin(model, torch.zeros(1, columns, dtype=torch.long, device=device), None, fixed=False)
        for layer in range(LAYERS):
            cache.update(new, new, layer)
        streams.end(model, completed=True)

    feed(window, states(window, device))
    token, ids = states(1, device), torch.zeros(1, 1, dtype=torch.long, device=device)

    def step() -> None:
        streams.begin(model, ids, None, fixed=False)
        for layer in range(LAYERS):
            cache.update(token, token, layer)
        streams.end(model, completed=True)

    return step


def static(model: LlamaForCausalLM, window: int, device: str) -> Step:
    own = (
        {"max_batch_size": 1, "device": device}
        if "device" in inspect.signature(StaticCache.__init__).parameters
        else {}
    )
    cache = StaticCache(config=model.config, max_cache_len=window + 2000, **own)
    token, at = states(1, device), torch.tensor([window], device=device)
    if not own:  # newer versions count the tokens that were fed
        filled = states(window, device)
        for layer in range(LAYERS):
            cache.update(filled, filled, layer)

    def step() -> None:
        for layer in range(LAYERS):
            cache.update(token, token, layer, {"cache_position": at})

    return step


def dynamic(_model: LlamaForCausalLM, window: int, device: str) -> Step:
    cache, token, filled = DynamicCache(), states(1, device), states(window - 1, device)
    for layer in range(LAYERS):
        cache.update(filled, filled, layer)

    def step() -> None:
        for layer in range(LAYERS):
            cache.update(token, token, layer)
        cache.crop(-1)  # returns views, in almost no time

    return step


def old(model: LlamaForCausalLM, window: int, device: str) -> Step | None:
    if not hasattr(transformers, "SinkCache"):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        cache = transformers.SinkCache(window, SINKS)
    positions = torch.arange(window + 1, device=device)[None]
    token, filled = states(1, device), states(window, device)
    cos, sin = model.model.rotary_emb(filled, positions)

    def feed(new: torch.Tensor, first: int) -> None:
        last = first + new.shape[2]
        for layer in range(LAYERS):
            cache.update(new, new, layer, {"sin": sin[:, first:last], "cos": cos[:, first:last]})

    feed(filled, 0)
    # it stores a table of the positions that it was given
    return lambda: feed(token, window - 1)


def milliseconds(step: Step, count: int, device: str) -> float:
    """Median time of `count` steps, after a few that warm the processor's caches."""
    times = []
    for _ in range(count + WARM):
        start = time.perf_counter()
        step()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[WARM:])


@torch.no_grad()
def run(device: str, rounds: int) -> list[dict[str, float]]:
    model, rows = make_model(device), []
    for window in WINDOWS:
        made = {make.__name__: make(model, window, device) for make in (ours, static, dynamic, old)}
        steps = {name: step for name, step in made.items() if step is not None}
        found: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(rounds):
            for name, times in found.items():
                times.append(milliseconds(steps[name], 2 if name in GROWING else BLOCK, device))
        medians = {name: statistics.median(times) for name, times in found.items()}
        row = {"W": window}
        row |= {f"{name}/static": round(value / medians["static"], 2) for name, value in medians.items()}
        if "old" in medians:
            row["old/ours"] = round(medians["old"] / medians["ours"], 1)
        row |= {f"{name}_ms": round(value, 3) for name, value in medians.items()}
        rows.append(row)
        print("  ".join(f"{name} {value:g}" for name, value in row.items()), flush=True)
    flat = rows[-1]["ours_ms"] / rows[0]["ours_ms"]
    print(f"ours, W = {WINDOWS[-1]} against {WINDOWS[0]}: {flat:.2f}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = run(arguments.device, arguments.rounds)
    records.write(arguments.json, device=arguments.device, rows=rows)


if __name__ == "__main__":
    main()
