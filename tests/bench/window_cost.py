"""What a window costs for well-known models: `python -m tests.bench.window_cost` prints the table of the README.

Bytes of one row in bfloat16, from the models' configs alone: models on the meta device have no weights, so nothing is
downloaded or allocated. Beside `SinkCache` (4 sinks) a `DynamicCache` that has read 32,768 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache

from sink_patch.arguments import Sizes
from sink_patch.models.claims import read_claim
from sink_patch.models.cost.sample import read_cache
from sink_patch.models.cost.window import cost_of, in_words
from sink_patch.models.entries import cache_argument, text_config
from tests.bench.decode import SINKS

WINDOWS, CONTEXT = (1024, 4096), 32_768
_LLAMA = {"vocab_size": 128_256, "max_position_embeddings": 131_072, "num_key_value_heads": 8, "head_dim": 128}
_QWEN3 = {"vocab_size": 151_936, "max_position_embeddings": 40_960, "num_key_value_heads": 8, "head_dim": 128}


def _sizes(hidden: int, intermediate: int, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {**others, **dict(zip(names, (hidden, intermediate, layers, heads), strict=True))}


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "SmolLM2 135M": (
        "llama",
        _sizes(576, 1536, 30, 9, num_key_value_heads=3, vocab_size=49_152, max_position_embeddings=8192),
    ),
    "Qwen3 0.6B": ("qwen3", _sizes(1024, 3072, 28, 16, **_QWEN3)),
    "Llama 3.2 1B": ("llama", _sizes(2048, 8192, 16, 32, **{**_LLAMA, "head_dim": 64})),
    "Gemma 3 1B": (
        "gemma3_text",
        _sizes(
            *(1152, 6912, 26, 4),
            num_key_value_heads=1,
            head_dim=256,
            sliding_window=512,
            max_position_embeddings=32_768,
            vocab_size=262_144,
        ),
    ),
    "Phi-3 mini 4k": (
        "phi3",
        _sizes(
            *(3072, 8192, 32, 32),
            num_key_value_heads=32,
            sliding_window=2047,
            vocab_size=32_064,
            max_position_embeddings=4096,
            original_max_position_embeddings=4096,
        ),
    ),
    "Mistral 7B v0.3": (
        "mistral",
        _sizes(
            *(4096, 14_336, 32, 32),
            num_key_value_heads=8,
            head_dim=128,
            sliding_window=None,
            vocab_size=32_768,
            max_position_embeddings=32_768,
        ),
    ),
    "Llama 3.1 8B": ("llama", _sizes(4096, 14_336, 32, 32, **_LLAMA)),
    "Qwen3 8B": ("qwen3", _sizes(4096, 12_288, 36, 32, **_QWEN3)),
    "gpt-oss 20b": (
        "gpt_oss",
        _sizes(
            *(2880, 2880, 24, 64),
            num_key_value_heads=8,
            head_dim=64,
            sliding_window=128,
            num_local_experts=32,
            num_experts_per_tok=4,
            vocab_size=201_088,
            max_position_embeddings=131_072,
        ),
    ),
    "Gemma 3 27B": (
        "gemma3_text",
        _sizes(
            *(5376, 21_504, 62, 32),
            num_key_value_heads=16,
            head_dim=128,
            sliding_window=1024,
            max_position_embeddings=131_072,
            vocab_size=262_208,
        ),
    ),
    "Llama 3.1 70B": ("llama", _sizes(8192, 28_672, 80, 64, **_LLAMA)),
}


def on_meta(model_type: str, settings: dict[str, Any]) -> Any:
    """A model without weights; its frequencies lie on the CPU, as adapters are made from them."""
    config = CONFIG_MAPPING[model_type](**settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    if "num_local_experts" in settings:
        model.set_experts_implementation("batched_mm")  # the one that asks no tensor for its data
    return model


@torch.no_grad()
def row(name: str) -> list[str]:
    """The cells of a model: bytes at each window, of a token more, and of the `DynamicCache`."""
    model = on_meta(*MODELS[name])
    claim = read_claim(model)
    assert claim.family is not None
    facts = claim.facts(claim.adapters_of(claim.family.adapters))
    dynamic = DynamicCache(config=model.config)
    ids = torch.zeros(1, CONTEXT, dtype=torch.long, device="meta")
    model.model(ids, **{cache_argument(model.model): dynamic})
    samples = read_cache(dynamic, facts)
    costs = [cost_of(facts, text_config(model), samples, Sizes(window, SINKS)) for window in WINDOWS]
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in dynamic.layers)
    return [name, *(in_words(count) for count in (*(one.window_bytes for one in costs), costs[0].token_bytes, held))]


def table() -> Iterator[str]:
    """The lines of the table in Markdown."""
    head = ["bfloat16, one row", *(f"window of {window}" for window in WINDOWS)]
    head += [f"a token more than {WINDOWS[0]}", f"`DynamicCache` at {CONTEXT:,}"]
    for cells in (head, ["---"] * len(head), *map(row, MODELS)):
        yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(*table(), sep="\n")
