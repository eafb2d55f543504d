"""A stream of millions of tokens, against the oracle: `python -m tests.bench.forever [--tokens 4000000] [--json PATH]`.

A random Llama of one layer decodes random tokens one by one, compiled (`--eager`: not compiled), with a window of 64
and a context of 256, so that its clock is set back every few hundred tokens. At random points of each stretch the
logits are compared with a fresh forward over the visible tokens (tests/support/oracle.py). Memory is that of the
process at the end of the stretch.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
from pathlib import Path

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sink_patch
from tests.bench import records
from tests.support.oracle import relative_error

WINDOW, SINKS, STRETCH, POINTS = 64, 4, 100_000, 20


def make_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(make_config()).eval()


class Stream:
    """Random tokens, of which only the visible ones are kept."""

    def __init__(self) -> None:
        self.generator, self.kept = torch.Generator().manual_seed(0), torch.empty(1, 0, dtype=torch.long)

    def next(self, count: int) -> torch.Tensor:
        new = torch.randint(97, (1, count), generator=self.generator)
        kept = torch.cat((self.kept, new), dim=1)
        recent = kept[:, max(SINKS, kept.shape[1] - (WINDOW - SINKS)) :]
        self.kept = torch.cat((kept[:, :SINKS], recent), dim=1)
        return new


def resident_megabytes() -> float:
    gc.collect()
    return psutil.Process().memory_info().rss / 1e6


@torch.no_grad()
def stretch(model: LlamaForCausalLM, fresh: LlamaForCausalLM, cache: sink_patch.SinkCache, stream: Stream) -> dict:
    points, worst, spent = set(random.sample(range(STRETCH), POINTS)), 0.0, 0.0
    for step in range(STRETCH):
        token = stream.next(1)
        start = time.perf_counter()
        logits = model(token, past_key_values=cache).logits[:, -1]
        spent += time.perf_counter() - start
        if step in points:
            worst = max(worst, relative_error(logits, fresh(stream.kept, use_cache=False).logits[:, -1]))
    return {
        "tokens": cache.get_seq_length(),
        "ms_a_token": round(1000 * spent / STRETCH, 4),
        "worst_error": worst,
        "resident_mb": round(resident_megabytes(), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4_000_000)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    model, fresh, stream = make_model(), make_model(), Stream()
    cache = sink_patch.SinkCache(WINDOW, SINKS, model=model)
    if not arguments.eager:
        model.forward = torch.compile(model.forward, fullgraph=True, dynamic=False)
    with torch.no_grad():
        model(stream.next(WINDOW), past_key_values=cache)
        for _ in range(10):
            model(stream.next(1), past_key_values=cache)
    start, rows = resident_megabytes(), []
    print(f"a window full: {start:.2f} MB", flush=True)
    for _ in range(arguments.tokens // STRETCH):
        rows.append(stretch(model, fresh, cache, stream))
        print("  ".join(f"{name} {value:>12.7g}" for name, value in rows[-1].items()), flush=True)
    records.write(
        arguments.json,
        window_length=WINDOW,
        num_sink_tokens=SINKS,
        compiled=not arguments.eager,
        points_a_stretch=POINTS,
        resident_mb_with_a_window_full=round(start, 2),
        rows=rows,
    )


if __name__ == "__main__":
    main()
