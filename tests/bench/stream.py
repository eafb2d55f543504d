"""Time per token and memory of one long stream: `python -m tests.bench.stream [--tokens 20000] [--json PATH]`.

A random Llama (4 layers, hidden 256) decodes token by token with a `SinkCache` of 256. Every stretch of 1,000 tokens is
measured in blocks of 100, each followed by a block of a second, fresh stream that has just filled its window: the ratio
of the two does not depend on the load of the machine. Peak memory is that of the process.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import sink_patch

WINDOW, BLOCK, STRETCH = 256, 100, 1000


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
    )
    return LlamaForCausalLM(config).eval()


def decode(model: LlamaForCausalLM, cache: sink_patch.SinkCache, token: torch.Tensor, count: int) -> float:
    """Milliseconds per token."""
    start = time.perf_counter()
    for _ in range(count):
        token = model(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
    return 1000 * (time.perf_counter() - start) / count


@torch.inference_mode()
def run(tokens: int) -> list[dict[str, float]]:
    model, token, rows = make_model(), torch.tensor([[7]]), []
    cache = sink_patch.SinkCache(WINDOW, model=model)
    for seen in range(STRETCH, tokens + 1, STRETCH):
        pairs = []
        for _ in range(STRETCH // BLOCK):
            fresh = sink_patch.SinkCache(WINDOW, model=model)
            model(torch.randint(1000, (1, WINDOW)), past_key_values=fresh)
            pairs.append((decode(model, cache, token, BLOCK), decode(model, fresh, token, BLOCK)))
        rows.append(
            {
                "tokens": seen,
                "ms_a_token": round(statistics.median(long for long, _ in pairs), 3),
                "against_a_stream_just_full": round(statistics.median(long / short for long, short in pairs), 3),
                "cache_mb": round(cache.nbytes / 1e6, 3),
                "peak_process_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
            }
        )
        print("  ".join(f"{name} {value:>9}" for name, value in rows[-1].items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = run(arguments.tokens)
    if arguments.json is not None:
        versions = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        record = {"window_length": WINDOW, "machine": platform.machine(), "threads": 1, **versions, "rows": rows}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
