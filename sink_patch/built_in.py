"""The built-in families: data only. How position enters the keys was measured; the probe checks it on each model."""

from __future__ import annotations

from typing import Any

from sink_patch.adapters import AdapterFactory, rope, sinusoidal_table
from sink_patch.adapters.rope import layer_types
from sink_patch.family import Family

_LEARNED = (
    "it adds learned (or sinusoidal) positions to the embeddings, so a token's position is mixed into its keys and "
    "values and cannot be changed afterwards"
)
_AFTER_NORM = (
    "it normalises keys after the rotation, so attention depends on absolute position and not on distance alone"
)
_QUERY_SCALE = "it scales queries by absolute position, which a stream without end runs away with"


def _full_layers_skip(config: Any, layer_idx: int) -> bool:
    """Only sliding layers have positions (modeling_cohere2)."""
    return layer_types(config)[layer_idx] == "full_attention"


def _full_beside_sliding_skip(config: Any, layer_idx: int) -> bool:
    """Full layers have positions only in a model without sliding layers (modeling_exaone4)."""
    return config.sliding_window is not None and _full_layers_skip(config, layer_idx)


def _listed_layers_skip(config: Any, layer_idx: int) -> bool:
    """`no_rope_layers` holds a 1 for layers *with* rotation (modeling_smollm3)."""
    return not config.no_rope_layers[layer_idx]


def _rotary_dim(config: Any) -> int:
    """Without `rotary_dim` all of the embedding turns (modeling_gptj, modeling_codegen)."""
    return int(config.rotary_dim or config.hidden_size)


HALF = rope()
INTERLEAVED = rope("interleaved")


def _family(name: str, adapters: AdapterFactory, *model_types: str, **more: Any) -> Family:
    return Family(name=name, model_types=model_types or (name,), adapters=adapters, **more)


def _refused(name: str, reason: str, *model_types: str) -> Family:
    return Family(name=name, model_types=model_types or (name,), refusal=reason)


BUILT_IN = (
    _family("llama", HALF),
    _family("mistral", HALF),
    _family("mixtral", HALF),
    _family("qwen2", HALF, "qwen2", "qwen2_moe"),
    _family("qwen3", HALF, "qwen3", "qwen3_moe"),
    _family("gemma", HALF),
    _family("gemma2", HALF),
    _family("gemma3", HALF, "gemma3", "gemma3_text"),
    _family("phi", HALF),
    _family("phi3", HALF),
    _family("gpt_neox", HALF),
    _family("stablelm", HALF),
    _family("starcoder2", HALF),
    _family("olmo", HALF, "olmo", "olmo2", "olmo3"),
    _family("granite", HALF),
    _family("nemotron", HALF),
    _family("gpt_oss", HALF),
    _family("persimmon", HALF),
    _family("seed_oss", HALF),
    _family("smollm3", rope(skips=_listed_layers_skip)),
    _family("exaone4", rope(skips=_full_beside_sliding_skip)),
    _family("falcon", HALF),
    _family("cohere", INTERLEAVED),
    _family("cohere2", rope("interleaved", skips=_full_layers_skip)),
    _family("glm", INTERLEAVED, "glm", "glm4"),
    _family("ernie4_5", INTERLEAVED),
    _family("helium", INTERLEAVED),
    _family("gptj", sinusoidal_table(_rotary_dim), has_table=True),
    _family("codegen", sinusoidal_table(_rotary_dim), has_table=True),
    _refused("gpt2", _LEARNED, "gpt2", "gpt-sw3", "gpt_bigcode", "gpt_neo", "openai-gpt", "imagegpt"),
    _refused("opt", _LEARNED, "opt", "biogpt", "xglm", "ctrl", "xlm"),
    _refused(
        "bert",
        _LEARNED,
        *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
        *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "xlm-roberta", "xlm-roberta-xl", "xmod", "git"),
    ),
    _refused("hunyuan_v1", _AFTER_NORM, "hunyuan_v1_dense", "hunyuan_v1_moe"),
    _refused("llama4", _QUERY_SCALE, "llama4", "llama4_text"),
    _refused("ministral3", _QUERY_SCALE),
)
