"""How far cached keys drift in 16 bits: `python -m tests.bench.precision [--tokens 100000] [--json PATH]`.

A random Llama of one layer decodes token by token with a window of 64: with our cache and, if transformers 4.52.4 is
installed, with its old SinkCache (positions clamped to W - 1, which is the only right way to use it). At each point the
cached keys are compared with the model's own un-rotated keys, rotated in float64 to the positions in the cache. The
error is the norm of the difference to the norm of the key, over all keys of the window; one rounding is 2^-8 = 3.9e-3
in bfloat16 and 2^-11 = 4.9e-4 in float16.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaForCausalLM

import sink_patch
from tests.bench import forever, records
from tests.streaming.test_precision import exactly_rotated, keys_of, relative_errors

WINDOW, SINKS = 64, 4
RING = WINDOW - SINKS
POINTS = (1_000, 10_000, 100_000)


def make_model(dtype: torch.dtype) -> LlamaForCausalLM:
    made, config = forever.make_model(), forever.make_config()
    setattr(config, "dtype" if hasattr(config, "dtype") else "torch_dtype", dtype)
    model = LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()  # frequencies stay in float32
    model.load_state_dict(made.state_dict())
    return model


class Ours:
    name = "ours"

    def __init__(self, model: LlamaForCausalLM):
        self.model, self.cache, self.newest = model, sink_patch.SinkCache(WINDOW, SINKS, model=model), 0
        model.model.register_forward_pre_hook(self._record, with_kwargs=True)

    def _record(self, _module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("past_key_values", kwargs.get("cache")) is self.cache:
            self.newest = int(kwargs["position_ids"])

    def feed(self, token: torch.Tensor, _index: int) -> None:
        self.model(token, past_key_values=self.cache)

    def shown(self, seen: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [W, heads, dim] in the order of the stream, and their positions [W]."""
        indices = [*range(SINKS), *range(seen - RING, seen)]
        slots = [index if index < SINKS else SINKS + (index - SINKS) % RING for index in indices]
        return self.cache.layers[0].keys[0, :, slots].transpose(0, 1), self.newest - (WINDOW - 1) + torch.arange(WINDOW)


class Old:
    name = "the old SinkCache"

    def __init__(self, model: LlamaForCausalLM):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.model, self.cache = model, transformers.SinkCache(WINDOW, SINKS)

    def feed(self, token: torch.Tensor, index: int) -> None:
        at = torch.tensor([min(index, WINDOW - 1)])
        self.model(token, past_key_values=self.cache, position_ids=at[None], cache_position=at)

    def shown(self, _seen: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.cache.key_cache[0][0].transpose(0, 1), torch.arange(WINDOW)


@torch.no_grad()
def run(kind: type, dtype: torch.dtype, tokens: int) -> list[dict[str, Any]]:
    model, rows = make_model(dtype), []
    one = kind(model)
    stream = torch.randint(97, (1, tokens), generator=torch.Generator().manual_seed(0))
    for index in range(tokens):
        one.feed(stream[:, index : index + 1], index)
        if index + 1 in POINTS:
            keys, positions = one.shown(index + 1)
            kept = torch.cat((stream[0, :SINKS], stream[0, index + 1 - RING : index + 1]))
            fresh = exactly_rotated(model, keys_of(model, kept, torch.zeros_like(positions)), positions)
            error = relative_errors(keys, fresh)
            rows.append(
                {
                    "cache": one.name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "tokens": index + 1,
                    "mean_error": float(f"{error.mean().item():.2e}"),
                    "worst_error": float(f"{error.max().item():.2e}"),
                }
            )
            print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kinds = (Ours, Old) if hasattr(transformers, "SinkCache") else (Ours,)
    rows = [
        row for dtype in (torch.bfloat16, torch.float16) for kind in kinds for row in run(kind, dtype, arguments.tokens)
    ]
    records.write(arguments.json, window_length=WINDOW, num_sink_tokens=SINKS, rows=rows)


if __name__ == "__main__":
    main()
