"""The value of every setting that is a size in a tiny model, by its name, for all families."""

from __future__ import annotations

from typing import Any

from tests.support.tiny import VOCAB

WIDTH, HEADS, HEAD_DIM, CONTEXT, WINDOW = 64, 4, 16, 256, 8

_NAMES_BY_SIZE: dict[int, str] = {
    VOCAB: "vocab_size unpadded_vocab_size decoder_vocab_size vocab_size_per_layer_input audio_vocab_size",
    CONTEXT: """
        max_position_embeddings n_positions n_ctx max_seq_len max_target_positions context_length model_max_length
        original_max_position_embeddings max_source_positions keep_window_size mem_len rel_extent relative_max_distance
        position_bias_max_distance position_embedding_size mm_posemb_size
        chroma_length encoder_hash_byte_group_vocab""",
    2 * WIDTH: "mamba_d_ssm",  # mamba_expand times the width
    WIDTH: """
        hidden_size d_model n_embd emb_dim embedding_size embedding_dim input_embedding_size output_embedding_size
        hidden_size_global backbone_hidden_size pronunciation_embed_dim shape_embed_dim hc_lowrank ple_embed_dim
        intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim dff dim_ff d_inner d_ff feed_forward_size
        ffn_hidden_size intermediate_size_mlp dense_intermediate_size ffn_round_up_to_multiple_of
        adapter_in_dim adapter_input_size adapter_out_dim downsample_hidden_size out_hidden_size vision_output_dim
        projector_input_dim projector_output_dim text_hidden_size input_size mlp_dim output_channels
        mm_embed_dim output_proj_dims audio_embed_dim
        nemo_conv_channels ext_pw_out_channel depthwise_separable_out_channel codebook_dim""",
    32: """
        moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size
        shared_intermediate_size moe_shared_expert_intermediate_size expert_ffn_hidden_size router_hidden_size
        hidden_size_per_layer_input kv_lora_rank q_lora_rank o_lora_rank index_head_dim prompt_mid_dim
        classifier_proj_size pronunciation_vocab_size shape_vocab_size position_bias_num_buckets num_buckets
        image_size crop_size codebook_size""",
    # index_n_heads: with few index heads, all may give 0 for a token, and the selection among such tokens is arbitrary
    HEAD_DIM: """
        head_dim swa_head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim dim_head attention_head_size kv_channels
        d_head d_kv query_pre_attn_scalar linear_key_head_dim linear_value_head_dim linear_head_dim index_n_heads
        state_size mamba_d_state ssm_state_size mamba_head_dim mamba_d_head block_multiple_of
        num_position_embeddings num_mel_bins num_filters""",
    WINDOW: """
        sliding_window sliding_window_size attention_window_size window_size local_attention local_attention_window_len
        attention_chunk_size index_topk index_block_size block_size chunk_size mamba_chunk_size
        lsh_attn_chunk_length local_attn_chunk_length""",
    8: """
        rotary_dim laurel_rank adapter_rank gated_norm_rank d_rel patch_size prompt_length prompt_types segment_types
        mamba_n_heads mamba_num_heads n_mamba_heads""",
    HEADS: """
        num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads decoder_attention_heads
        num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads linear_num_value_heads
        linear_num_heads num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num""",
    2: """
        num_key_value_heads swa_num_key_value_heads linear_num_key_heads n_groups o_groups adapter_reduction_factor
        num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts index_topk_blocks num_codebooks
        num_random_blocks encoder_layers num_encoder_layers depth conf_num_hidden_layers conf_num_attention_heads""",
    1: """
        n_group topk_group num_expert_group n_shared_experts num_shared_experts moe_num_shared_experts
        first_k_dense_replace num_dense_layers num_nextn_predict_layers num_mtp_layers mamba_n_groups mamba_ngroups""",
}
SIZES: dict[str, int] = {name: size for size, names in _NAMES_BY_SIZE.items() for name in names.split()}

# the settings that say how many layers there are
DEPTHS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "num_decoder_layers",
    "num_blocks",
)

# a setting without a default is derived from others, or switches something off; these two are set nevertheless
ALSO_WHERE_UNSET = frozenset({"num_key_value_heads", "head_dim"})

TOKEN_IDS = frozenset({"pad_token_id", "bos_token_id", "eos_token_id"})

# no sizes, but their defaults do not fit
ALWAYS: dict[str, Any] = {
    "pad_token_id": 0,
    "pad_index": 0,
    "bos_token_id": 1,
    "eos_token_id": None,  # tests choose where a text ends
    "is_decoder": True,  # also for encoders in the table
    "use_mamba_kernels": False,  # of a package that is not installed
    "attention_multiplier": HEAD_DIM**-0.5,  # the default is for other head sizes
}
