"""What the tiny config of a family needs besides small sizes: one record each, by the decoder's model type.

A kind of layer has the name of its type in transformers, and a variant after a colon if layers of this type differ in
what they cache: `full_attention:nope` has no positions, `sliding_attention:shared` uses another layer's keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tests.support.versions import PreTrainedConfig, caches_need_states, families_have_caches
from tests.support.zoo.sizes import CONTEXT, HEAD_DIM, HEADS, WIDTH, WINDOW
from tests.support.zoo.towers import no_vision_tower

Stack = tuple[str, ...]  # the layers of a model, first to last
Settings = Mapping[str, Any]

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
INDEXED, LINEAR, HYBRID = "indexed_attention", "linear_attention", "hybrid"
SHARED_FULL, SHARED_SLIDING, SHARED_INDEX = f"{FULL}:shared", f"{SLIDING}:shared", f"{INDEXED}:shared"
NOPE, NGRAM = f"{FULL}:nope", f"{LINEAR}:ngram"


def layer_type(layer: str) -> str:
    """The name of the type in transformers."""
    return layer.partition(":")[0]


def where(stack: Stack, layer: str) -> list[int]:
    """The indices of the layers of this kind."""
    return [index for index, other in enumerate(stack) if other == layer]


def shared(stack: Stack) -> int:
    """How many layers use another layer's keys."""
    return sum(layer.endswith(":shared") for layer in stack)


@dataclass(frozen=True)
class Family:
    """What is special about the configs of one model type.

    Args:
        stack: the layers of the model that `build` makes, if the default config does not have each kind of layer.
        settings: values that differ from those of `sizes.py`.
        stack_settings: the settings for a stack, besides its depth and `layer_types`.
        smallest: for a kind of layer, the shortest stack that has it, if `configs.py` would not find it.
        parts: configs inside the config that `configs.py` cannot make.
    """

    stack: Stack = ()
    settings: Settings = field(default_factory=dict)
    stack_settings: Callable[[Stack], Settings] = lambda stack: {}
    smallest: Mapping[str, Stack] = field(default_factory=dict)
    parts: Callable[[], Mapping[str, PreTrainedConfig]] = dict


def _alike(names: str, family: Family) -> Iterable[tuple[str, Family]]:
    return [(name, family) for name in names.split()]


def _scaled(rope_type: str, **rope: Any) -> Settings:
    """Settings of a scaled rotation whose original context is shorter than that of the tiny model."""
    return {"rope_parameters": {"rope_type": rope_type, "original_max_position_embeddings": CONTEXT // 4, **rope}}


def _smallest_if(needed: bool, **smallest: Stack) -> Mapping[str, Stack]:
    return smallest if needed else {}


# transformers applies a lower limit for whole prompts, not for single steps
_NO_LEAST_STEP: Settings = {"time_step_min": 1e-9}
# the latent is expanded to a key for each head
_MLA = Family(settings={"num_key_value_heads": HEADS})
_SHARED_INDEXER = Family(
    stack=(INDEXED, SHARED_INDEX),
    settings=_MLA.settings,
    stack_settings=lambda stack: {"indexer_types": ["shared" if layer == SHARED_INDEX else "full" for layer in stack]},
    smallest={SHARED_INDEX: (INDEXED, SHARED_INDEX)},
)
_SHARED_KEYS = Family(
    stack=(SLIDING, FULL, SHARED_SLIDING, SHARED_FULL),
    stack_settings=lambda stack: {"num_kv_shared_layers": shared(stack)},
    smallest={SHARED_SLIDING: (SLIDING, SHARED_SLIDING), SHARED_FULL: (FULL, SHARED_FULL)},
)
_GEMMA4 = Family(
    stack=_SHARED_KEYS.stack,
    settings={"global_head_dim": 2 * HEAD_DIM},
    stack_settings=_SHARED_KEYS.stack_settings,
    # the last layer is always one of full attention
    smallest={**_SHARED_KEYS.smallest, SLIDING: (SLIDING, FULL), SHARED_SLIDING: _SHARED_KEYS.stack},
)

FAMILIES: dict[str, Family] = dict(
    [
        *_alike("axk1 axk2 bailing_hybrid deepseek_v3 deepseek_v32 glm4_moe_lite kimi_linear", _MLA),
        *_alike("longcat_flash minicpm3 sarvam_mla youtu", _MLA),
        *_alike("glm_moe_dsa hy_v4", _SHARED_INDEXER),
        *_alike("gemma4_text gemma4_unified_text", _GEMMA4),
        *_alike(
            "qwen2 qwen2_moe qwen3",
            Family(stack=(FULL, SLIDING), settings={"use_sliding_window": True, "sliding_window": WINDOW}),
        ),
        *_alike("laguna mellum ministral", Family(stack=(FULL, SLIDING))),
        *_alike(
            "lfm2 lfm2_moe",
            Family(stack=("conv", FULL), smallest=_smallest_if(families_have_caches(), full_attention=("conv", FULL))),
        ),
        *_alike(
            "qwen3_5_text qwen3_5_moe_text qwen3_next",
            Family(
                smallest=_smallest_if(families_have_caches() or caches_need_states(), full_attention=(LINEAR, FULL))
            ),
        ),
        *_alike("musicgen_decoder musicgen_melody_decoder", Family(settings={"num_codebooks": 1})),
    ]
) | {
    "apertus": Family(
        settings=_scaled("llama3", rope_theta=12e6, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    ),
    "bamba": Family(
        stack=(LINEAR, FULL),
        stack_settings=lambda stack: {"attn_layer_indices": where(stack, FULL)},
        smallest=_smallest_if(caches_need_states(), full_attention=(LINEAR, FULL)),
    ),
    "blt": Family(settings={"num_hidden_layers": 2}),  # its cache reads this, and the config has no such field
    "cohere_compass_text": Family(
        stack=(SLIDING, FULL),
        settings={
            "rope_parameters": {
                SLIDING: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
                FULL: None,
            }
        },
    ),
    "cwm": Family(settings=_scaled("llama3", rope_theta=1e6, factor=16.0, low_freq_factor=1.0, high_freq_factor=4.0)),
    "dbrx": Family(settings={"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}}),
    "deepseek_v2": Family(settings={**_MLA.settings, "num_experts_per_tok": 2}),
    "deepseek_v4": Family(
        stack=(SLIDING, "heavily_compressed_attention", "compressed_sparse_attention"),
        settings={
            "head_dim": 4 * HEAD_DIM,  # of which an eighth is rotated
            "num_key_value_heads": 1,
            "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        },
    ),
    # the last layer runs in a loop, with keys of its own in each round
    "dory": Family(stack_settings=lambda stack: {"n_input_layers": len(stack) - 1, "n_output_layers": 0}),
    "dots1": Family(
        stack=(FULL, SLIDING), settings={"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
    ),
    "dots3_note_text": Family(
        settings={
            **_MLA.settings,
            "swa_num_attention_heads": 2,
            "swa_num_key_value_heads": 2,
            "swa_q_lora_rank": 32,
            "swa_kv_lora_rank": 48,
            "swa_head_dim": HEAD_DIM + 8,
            "swa_qk_nope_head_dim": HEAD_DIM,
            "swa_v_head_dim": HEAD_DIM,
        }
    ),
    "ernie4_5_moe": Family(stack_settings=lambda stack: {"moe_layer_start_index": len(stack) - 1}),
    "falcon_h1": Family(stack=(HYBRID,)),  # in old versions its config names only the attention of the layers
    "gemma3n": Family(parts=no_vision_tower),
    "gemma3n_text": replace(
        _SHARED_KEYS, settings={"activation_sparsity_pattern": None}
    ),  # the default has one value for each layer
    "gpt_neo": Family(stack=("global", "local"), stack_settings=lambda stack: {"attention_types": [[list(stack), 1]]}),
    "gpt_oss": Family(
        settings=_scaled("yarn", rope_theta=15e4, factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False)
    ),
    "granitemoehybrid": Family(stack=(LINEAR, FULL)),
    "jamba": Family(
        stack=(LINEAR, FULL),
        stack_settings=lambda stack: {
            "attn_layer_period": len(stack) + (FULL not in stack),
            "attn_layer_offset": (*stack, FULL).index(FULL),
        },
        smallest=_smallest_if(caches_need_states(), full_attention=(LINEAR, FULL)),
    ),
    "llama4_text": Family(
        stack=(CHUNKED, FULL),
        stack_settings=lambda stack: {"no_rope_layers": [int(layer == CHUNKED) for layer in stack]},
    ),
    "mamba2": Family(settings={"num_heads": 8}),  # times head_dim twice the width
    "mega": Family(settings={"bidirectional": False}),
    # its indexer has one head for each head of the keys
    "minimax_m3_vl_text": Family(stack=(FULL, "minimax_m3_sparse"), settings={"index_n_heads": 2}),
    "minimax": Family(smallest={LINEAR: (LINEAR,)}),
    "ministral3": Family(
        settings=_scaled("yarn", rope_theta=1e6, factor=16.0, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.1)
    ),
    "mllama_text_model": Family(
        stack=(FULL, "cross_attention"),
        settings={"rope_scaling": {"rope_type": "default"}},  # required, also where its default is None
        stack_settings=lambda stack: {"cross_attention_layers": where(stack, "cross_attention")},
    ),
    "moshi": Family(settings={"sliding_window": CONTEXT}),  # its cache uses the window, its mask does not
    "molmo2_adapter": Family(settings={"vision_feature_layer": [0, 1], "text_hidden_size": WIDTH}),
    "molmo2_vision": Family(settings={"image_size": [32, 32], "num_position_embeddings": 16}),
    "nemotron_h": Family(
        settings=_NO_LEAST_STEP,
        smallest=_smallest_if(caches_need_states(), full_attention=(LINEAR, FULL), mlp=(LINEAR, FULL, "mlp")),
    ),
    "olmo_hybrid": Family(smallest={FULL: (LINEAR, FULL)}),
    "qwen3_asr": Family(settings={"eos_token_id": 0}),  # required
    "qwen4_exp_text": Family(
        stack=(NGRAM, LINEAR, INDEXED),
        settings={
            "indexer_n_heads": 16,
            "indexer_kv_heads": 1,
            "indexer_head_dim": HEAD_DIM,
            "indexer_budget": WINDOW,
            "indexer_compress_ratio": 2,
            "ngram_vocab_size_base": 64,
            "make_ngram_vocab_size_divisible_by": 8,
            "heads_per_ngram": 2,
            "split_ngram_parts": 2,
            "eos_token_id": 0,  # required; tests feed no zeros
        },
        stack_settings=lambda stack: {"ple_layer_ids": [index + 1 for index in where(stack, NGRAM)]},
    ),
    "recurrent_gemma": Family(
        stack=(LINEAR, SLIDING),
        stack_settings=lambda stack: {
            "block_types": ["recurrent" if layer == LINEAR else "attention" for layer in stack]
        },
    ),
    "reformer": Family(
        stack=("local", "lsh"),
        settings={"axial_pos_shape": (16, 16), "axial_pos_embds_dim": (32, 32), "hash_seed": 0},
        stack_settings=lambda stack: {"attn_layers": list(stack)},
    ),
    "rwkv": Family(
        stack=(LINEAR, LINEAR), smallest={LINEAR: (LINEAR, LINEAR)}
    ),  # it divides by the number of layers minus one
    "smollm3": Family(
        stack=(FULL, NOPE), stack_settings=lambda stack: {"no_rope_layers": [int(layer != NOPE) for layer in stack]}
    ),
    "xlm": Family(settings={"causal": True}),
    "xlnet": Family(settings={"attn_type": "uni"}),
    # the cache rounds the width of keys up to 64, the model does not
    "xlstm": Family(stack=(LINEAR,), settings={"qk_dim_factor": 1.0}),
    "xmod": Family(settings={"default_language": "en_XX"}),
    # hybrid layers share weights, so there must be two
    "zamba": Family(
        stack=(LINEAR, HYBRID, HYBRID), smallest={LINEAR: (LINEAR, HYBRID, HYBRID), HYBRID: (HYBRID, HYBRID)}
    ),
    "zamba2": Family(settings={**_NO_LEAST_STEP, "use_mem_rope": True}),
    "zaya": Family(stack=(HYBRID, "hybrid_sliding"), settings={"num_experts_per_tok": 1, "sliding_window": WINDOW}),
}
