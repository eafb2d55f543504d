"""The built-in families: data only. How position enters the keys was measured; the probe checks it on each model.

A line is a scheme and the model types that follow it; each model type is a family of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sink_patch.compat import installed_shim
from sink_patch.models.adapters.adapter import AdapterFactory
from sink_patch.models.adapters.rope import Rope, SinusoidalTable, Unrotated
from sink_patch.models.families.family import Family, PositionLimit, PositionSource

_LEARNED = (
    "it adds learned (or sinusoidal) positions to the embeddings, so a token's position is mixed into its keys and "
    "values and cannot be changed afterwards"
)
_AFTER_NORM = "it normalises keys after the rotation, so attention depends on absolute position, not on distance alone"
_QUERY_SCALE = "it scales queries by absolute position, which a stream without end runs away with"
_INDEXED = "a learned index chooses which keys each query sees, and would have to be trimmed and turned beside them"
_COMPRESSED = "it caches keys that are compressed from several tokens, which cannot be turned or dropped one by one"
_NO_CACHE = "it has no attention whose cache grows: it streams without end by itself, with the default cache"
_CROSS = "some of its layers attend to an image, beside the text"
_INDEX_IN_VALUES = "it takes positions from the index in the sequence, and mixes them into keys and values"
_CONTEXT_BIAS = "a bias of its attention and its scale go by the length of the cache"
_DRAFTS = "it drafts for another model, whose keys it is given"
_LOOPS = "it runs some layers several times over, and takes their keys out of the cache by itself"
_TUPLES = "it keeps keys in tuples and takes no cache object"
_NO_POSITION_IDS = "its forward takes no positions: they are relative, and counted by itself"
_OWN_CACHE = "it accepts no cache but one of its own"
_STATE_ON_MODULE = "it keeps its recurrent state on the model and not in the cache, and starts it anew at position 0"
_STARTS_ANEW = "The recurrent states of this model start anew with each forward of several tokens"
_BYTE_PATCHES = "it runs several decoders with caches of their own over patches of bytes"


def _full_layers_skip(config: Any, layer_idx: int) -> bool:
    """Only sliding layers have positions (modeling_cohere2)."""
    return installed_shim().read_entries(config)[layer_idx].layer_type == "full_attention"


def _full_beside_sliding_skip(config: Any, layer_idx: int) -> bool:
    """Full layers have positions only in a model without sliding layers (modeling_exaone4)."""
    return config.sliding_window is not None and _full_layers_skip(config, layer_idx)


def _listed_layers_skip(config: Any, layer_idx: int) -> bool:
    """`no_rope_layers` holds a 1 for layers *with* rotation (modeling_smollm3)."""
    return not config.no_rope_layers[layer_idx]


def _all_skip_without_rope(config: Any, _layer_idx: int) -> bool:
    """`position_embedding_type` may be "nope" (modeling_granitemoehybrid)."""
    return getattr(config, "position_embedding_type", None) != "rope"


def _all_skip_with_alibi(config: Any, _layer_idx: int) -> bool:
    return bool(config.alibi)  # modeling_falcon


def _falcon_position_source(config: Any) -> PositionSource:
    return "columns" if config.alibi else "position_ids"


def _all_skip_without_mem_rope(config: Any, _layer_idx: int) -> bool:
    return not config.use_mem_rope  # modeling_zamba2


def _nope_dim(config: Any) -> int:
    """Where in an expanded key the rotated part starts (modeling_deepseek_v3 without a latent cache)."""
    return int(config.qk_nope_head_dim)


def _rotary_dim(config: Any) -> int:
    """Without `rotary_dim` all of the embedding turns (modeling_gptj, modeling_codegen)."""
    return int(config.rotary_dim or config.hidden_size)


HALF = Rope()
INTERLEAVED = Rope("interleaved")
LATENT = Rope(cached_in="values")
EXPANDED = Rope(start=_nope_dim)
ALIBI = Unrotated("ALiBi: keys in stream order")
NOPE = Unrotated("no positions in the attention")
STATE = Unrotated("no attention: transformers' own states, untouched")

TABLE = PositionLimit(lambda config: int(config.max_position_embeddings), "it looks its angles up in a table")
ALIBI_TABLE = PositionLimit(lambda config: int(config.max_seq_len), "its table of biases ends there")
CHUNK = PositionLimit(
    lambda config: int(min(config.attention_chunk_size or config.floor_scale, config.floor_scale - 1)),
    "past them its attention goes by chunks and scales its queries",
)
QUERY_SCALE = PositionLimit(
    lambda config: int(config.rope_parameters["original_max_position_embeddings"]), "past them it scales its queries"
)
INDEX = PositionLimit(lambda config: int(config.index_topk), "past them a learned index leaves keys out")


def _each(adapters: AdapterFactory, names: str, **more: Any) -> Iterable[Family]:
    """A family of its own for each name of a list in words."""
    return [Family(name=name, model_types=(name,), adapters=adapters, **more) for name in names.split()]


def _refused(reason: str, names: str) -> Iterable[Family]:
    return [Family(name=name, model_types=(name,), refusal=reason) for name in names.split()]


BUILT_IN: tuple[Family, ...] = (
    *_each(
        HALF, "llama mistral mixtral qwen2 qwen2_moe qwen3 qwen3_moe gemma gemma2 gemma3 gemma3_text phi phi3 gpt_neox"
    ),
    *_each(HALF, "stablelm starcoder2 olmo olmo2 olmo3 granite nemotron gpt_oss persimmon seed_oss apertus arcee"),
    *_each(
        HALF,
        "aria_text bitnet cwm dbrx diffllama doge dots1 emu3 emu3_text_model flex_olmo fuyu got_ocr2 gpt_neox_japanese",
    ),
    *_each(
        HALF, "granite_swa granitemoe granitemoe_swa granitemoeshared glm4_moe hy_v3 hyperclovax internlm3 jais2 jetmoe"
    ),
    *_each(HALF, "iquestcoder laguna mellum mimo_v2_flash minimax_m2 ministral modernbert-decoder olmoe phimoe"),
    *_each(HALF, "moshi", explicit_mask=True),
    *_each(
        HALF, "moss_transcribe_diarize phi4_multimodal solar_open vaultgemma gemma3n gemma3n_text gemma4 gemma4_text"
    ),
    *_each(
        HALF, "gemma4_unified gemma4_unified_text hrm_text qwen2_vl qwen2_vl_text qwen2_5_vl qwen2_5_vl_text qwen3_vl"
    ),
    *_each(HALF, "qwen3_vl_text apertus1p5 apertus1p5_text code_llama exaone sarvam_moe"),
    # attention beside recurrent or convolution states
    *_each(HALF, "bamba falcon_h1 lfm2 lfm2_moe lfm3 olmo_hybrid qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text"),
    *_each(HALF, "qwen3_next zaya"),
    *_each(STATE, "mamba2"),
    *_each(STATE, "mamba falcon_mamba", whole_prompts=_STARTS_ANEW),
    *_each(NOPE, "kimi_linear nemotron_h"),
    *_each(NOPE, "jamba zamba", whole_prompts=_STARTS_ANEW),
    *_each(Rope(skips=_all_skip_without_rope), "granitemoehybrid"),
    *_each(Rope(skips=_all_skip_without_mem_rope), "zamba2"),
    # some layers without positions
    *_each(Rope(skips=_full_layers_skip), "afmoe cohere_compass_text flint kolibri1 lara_mini"),
    *_each(Rope(skips=_full_beside_sliding_skip), "exaone4 exaone_moe"),
    *_each(Rope(skips=_listed_layers_skip), "smollm3"),
    # other pairings and signs
    *_each(INTERLEAVED, "cohere glm glm4 ernie4_5 ernie4_5_moe helium glm4v glm4v_text"),
    *_each(Rope("interleaved", skips=_full_layers_skip), "cohere2 cohere2_moe"),
    *_each(SinusoidalTable(_rotary_dim), "gptj codegen", position_limit=TABLE),
    *_each(Rope(sign=-1), "nanochat"),
    # multi-head latent attention: the rotated part is cached as "values"
    *_each(
        LATENT,
        "axk1 deepseek_v3 glm4_moe_lite longcat_flash minicpm3 youtu bailing_hybrid sarvam_mla",
        formerly=EXPANDED,
    ),
    *_each(Rope("interleaved", cached_in="values"), "deepseek_v2", formerly=Rope("interleaved", start=_nope_dim)),
    # exact within a limited number of positions, which the clock never leaves
    *_each(HALF, "ministral3", position_limit=QUERY_SCALE),
    *_each(
        Rope("interleaved", skips=_listed_layers_skip),
        "llama4 llama4_text",
        position_limit=CHUNK,
    ),
    *_each(
        LATENT,
        "axk2 deepseek_v32 glm_moe_dsa dots3_note dots3_note_text hy_v4",
        position_limit=INDEX,
        formerly=EXPANDED,
    ),
    # positions from the order of the keys
    *_each(Rope(skips=_all_skip_with_alibi), "falcon", position_source=_falcon_position_source),
    *_each(ALIBI, "bloom", position_source="columns"),
    *_each(ALIBI, "mpt", position_source="columns", position_limit=ALIBI_TABLE),
    *_refused(
        _LEARNED, "gpt2 gpt-sw3 gpt_bigcode gpt_neo openai-gpt imagegpt opt biogpt xglm ctrl xlm bert bert-generation"
    ),
    *_refused(
        _LEARNED, "big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta roberta-prelayernorm"
    ),
    *_refused(
        _LEARNED, "roc_bert xlm-roberta xlm-roberta-xl xmod git bart bigbird_pegasus blenderbot blenderbot-small"
    ),
    *_refused(
        _LEARNED, "marian mbart musicgen musicgen_decoder musicgen_melody musicgen_melody_decoder mvp pegasus plbart"
    ),
    *_refused(
        _LEARNED,
        "prophetnet xlm-prophetnet qdqbert speech_to_text_2 trocr whisper blip kosmos-2 kosmos-2.5",
    ),
    *_refused(_AFTER_NORM, "hunyuan_v1_dense hunyuan_v1_moe hunyuan_vl"),
    *_refused(_QUERY_SCALE, "beam"),
    *_refused(_INDEXED, "minimax_m3_vl_text minimax_m3_vl qwen4_exp qwen4_exp_text glm5_next mistral_large4"),
    *_refused(_COMPRESSED, "deepseek_v4"),
    *_refused(_NO_CACHE, "rwkv xlnet xlstm reformer"),
    *_refused(_CROSS, "mllama mllama_text_model"),
    *_refused(_INDEX_IN_VALUES, "cpmant roformer"),
    *_refused(_CONTEXT_BIAS, "inkling_text inkling2_text inkling2_loop_text inkling_mm_model inkling2 inkling2_loop"),
    *_refused(_BYTE_PATCHES, "blt"),
    *_refused(_OWN_CACHE, "minimax"),
    *_refused(_LOOPS, "dory"),
    *_refused(_TUPLES, "open-llama"),
    *_refused(_NO_POSITION_IDS, "mega transfo-xl"),
    *_refused(_DRAFTS, "gemma4_assistant gemma4_unified_assistant"),
    *_refused(_STATE_ON_MODULE, "recurrent_gemma"),
)
