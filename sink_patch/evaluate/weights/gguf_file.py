"""Reads the GGUF file of a Llama with byte-level BPE, and writes what transformers loads.

`from_pretrained(..., gguf_file=...)` reads the file three times, and for each module builds a table of all names that
GGUF knows: most of a minute for the demo model, every time. Here the file is read once, by the package `gguf`. How
weights are named and arranged: `LlamaModel` in llama.cpp's convert_hf_to_gguf.py, the other way round.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

_DTYPE = "float16"  # of the file: a rounding of 2^-11, beside 4-bit weights; half of what float32 would be to read
_FIXED = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL = 3  # the type of special tokens in GGUF


def convert(file: Path, folder: Path) -> None:
    """Write config.json, model.safetensors and the files of the tokenizer into an empty directory."""
    gguf: Any = importlib.import_module("gguf")
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    weights = {
        tensor.name: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).astype(_DTYPE))
        for tensor in reader.tensors
    }
    config = _config(fields, tied="output.weight" not in weights)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    named = {_name(name): _arranged(name, weight, heads).contiguous() for name, weight in weights.items()}
    save_file(named, folder / "model.safetensors", {"format": "pt"})
    _write(folder / "config.json", config)
    _tokenizer(fields).save(str(folder / "tokenizer.json"))
    _write(folder / "tokenizer_config.json", _tokenizer_config(fields))


def _write(file: Path, entries: dict[str, Any]) -> None:
    file.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


def _name(name: str) -> str:
    """blk.3.attn_q.weight is model.layers.3.self_attn.q_proj.weight."""
    if not name.startswith("blk."):
        return f"{_FIXED[name.removesuffix('.weight')]}.weight"
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{_IN_LAYER[part]}.weight"


def _arranged(name: str, weight: torch.Tensor, heads: dict[str, int]) -> torch.Tensor:
    """Rows of queries and keys [heads * 2 * half, in]: llama.cpp rotates neighbours, transformers the two halves."""
    count = next((count for part, count in heads.items() if f".{part}." in name), None)
    if count is None:
        return weight
    rows, width = weight.shape
    return weight.reshape(count, rows // count // 2, 2, width).transpose(1, 2).reshape(rows, width)


def _config(fields: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": _DTYPE,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 9),  # of 32 bits in the file
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": tied,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def _tokenizer(fields: dict[str, Any]) -> Any:
    """Byte-level BPE. Each digit is a token of its own, as the original tokenizer has it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer: Any = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer


def _tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": tokens[fields[f"tokenizer.ggml.{long}_token_id"]] for name, long in names.items()},
        "model_max_length": fields["llama.context_length"],
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "chat_template": fields["tokenizer.chat_template"],
    }
