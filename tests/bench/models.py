"""The models of the benchmarks: SmolLM2, one that the user names, or a Llama of a known size with random weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

_LLAMA_3 = {"vocab_size": 128_256, "max_position_embeddings": 131_072, "num_key_value_heads": 8}
_RANDOM = {
    "tiny-30-layers": {  # nearly all of its time is that of Python and of the cache
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 30,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
    },
    "smollm2-random": {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "tie_word_embeddings": True,
        **_LLAMA_3,
    },
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        **_LLAMA_3,
    },
}


def parser(about: str | None) -> argparse.ArgumentParser:
    """The arguments of all benchmarks of a model."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--model", help=f"a directory, a name on the hub, or one of {', '.join(_RANDOM)}; default SmolLM2"
    )
    made.add_argument("--window", type=int, default=256)
    made.add_argument("--device", default="cpu")
    made.add_argument("--dtype", default="float32")
    made.add_argument("--json", type=Path)
    return made


def load(arguments: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """(entries of the record, without any path; the model in eval mode on the device)."""
    name, model = _load(arguments.model, arguments.device, arguments.dtype)
    return {
        "model": name,
        "window_length": arguments.window,
        "device": arguments.device,
        "dtype": arguments.dtype,
    }, model


def _load(name: str | None, device: str, dtype: str) -> tuple[str, Any]:
    if name not in _RANDOM:
        from sink_patch.evaluate import models

        loaded = models.load(name, dtype)
        return loaded.name, loaded.model.to(device)
    torch.manual_seed(0)
    config = LlamaConfig(**_RANDOM[name], dtype=getattr(torch, dtype))
    with torch.device(device):
        return name, LlamaForCausalLM._from_config(config).eval()
