"""One record for each model type: what its tiny config needs, its pixels, and how many ids stand for an image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tests.support.media.pixels import (
    Inputs,
    crops,
    frames,
    in_row,
    line,
    listed,
    merged,
    patches,
    pixels,
    placed,
    pooled,
    shapes,
    sized,
    sounds,
    spectra,
    tiles,
    two_sizes,
    wave,
    with_masks,
)


@dataclass(frozen=True)
class Sample:
    """What is special about a model type.

    Args:
        columns: ids that stand for an image.
        inputs: from a number of images to the tensors of them.
        settings: of the config, nested for its parts.
        decoder: settings of the decoder's config.
        token: the name of the setting that holds the id; after a dot, of that part of the config.
        around: ids before and behind them.
    """

    columns: int
    inputs: Inputs
    settings: Mapping[str, Any] = field(default_factory=dict)
    decoder: Mapping[str, Any] = field(default_factory=dict)
    token: str = "image_token_id"
    around: tuple[list[int], list[int]] = ([], [])

    def ids(self, token: int) -> list[int]:
        """Those of one image."""
        before, behind = self.around
        return [*before, *[token] * self.columns, *behind]


_START, _END, _VIDEO = 92, 93, 91
_IDS = {"vision_start_token_id": _START, "vision_end_token_id": _END, "video_token_id": _VIDEO}
_GLM_IDS = {
    "image_start_token_id": _START,
    "image_end_token_id": _END,
    "video_token_id": _VIDEO,
    "video_start_token_id": 94,
    "video_end_token_id": 95,
}


def _mrope(ids: Mapping[str, int], sections: list[int], vision: Mapping[str, Any], **more: Any) -> Sample:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections, **more}
    settings = {**ids, "vision_config": {"out_hidden_size": 64, **vision}}
    return Sample(8, patches(384), settings, {"rope_parameters": rope}, around=([_START], [_END]))


_PIN = {"image_grid_pinpoints": [[32, 32]]}
_FOUR = {"mm_tokens_per_image": 4}
_SPEECH = {
    "encoder_config": {
        "input_dim": 16,
        "hidden_dim": 64,
        "num_layers": 1,
        "num_heads": 2,
        "dim_head": 32,
        "output_dim": 8,
        "context_size": 16,
    },
    "projector_config": {"encoder_hidden_size": 64},
}
_WAVE = {"downsampling_ratios": [2, 2], "depths": [1, 1, 1], "num_filters": 4, "hidden_size": 16, "vae_std": 0.0}
_WORDS_OF_CHAMELEON = {"<image>": 90, **{f"IMGIMG{letter}Z": 60 + code for code, letter in enumerate("ABCDEFGH")}}
_WORDS_OF_EMU3 = {
    "<image>": 90,
    "<|extra_200|>": 80,  # ends a row of an image
    **{f"<|visual token {code:06d}|>": 60 + code for code in range(8)},
}
_CODES = {
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
    "num_embeddings": 8,
    "embed_dim": 8,
    "latent_channels": 32,
    "projection_dim": 64,
    "image_token_embed_dim": 64,
}
_CODES_OF_WORDS = {**_CODES, "channel_multiplier": [1] * 4, "hidden_size": 32, "codebook_size": 8}

SAMPLES: dict[str, Sample] = {
    "llava": Sample(16, pixels(), token="image_token_index"),
    "vipllava": Sample(16, pixels(), {"vision_feature_layers": [-1, -1, -1, -2, -2]}, token="image_token_index"),
    "aya_vision": Sample(4, pixels(), token="image_token_index"),
    "got_ocr2": Sample(1, pixels(), token="image_token_index"),
    "internvl": Sample(4, pixels()),
    "deepseek_vl": Sample(16, pixels()),
    "ovis2": Sample(16, pixels()),
    "qianfan_ocr": Sample(4, pixels()),
    "gemma3": Sample(4, pixels(), _FOUR, token="image_token_index"),
    "shieldgemma2": Sample(4, pixels(), _FOUR, token="image_token_index"),
    "pp_chart2table": Sample(1, pixels()),
    "paligemma": Sample(
        16, pixels(), {"projection_dim": 64, "vision_config": {"projection_dim": 64}}, token="image_token_index"
    ),
    "idefics2": Sample(64, in_row()),
    "idefics3": Sample(4, in_row(), {"scale_factor": 2}),
    "smolvlm": Sample(4, in_row(), {"scale_factor": 2}),
    "mistral3": Sample(4, sized(), token="image_token_index"),
    "lighton_ocr": Sample(4, sized()),
    "llava_next": Sample(36, tiles, _PIN, token="image_token_index"),
    "llava_onevision": Sample(36, tiles, _PIN, token="image_token_index"),
    "llava_next_video": Sample(36, tiles, _PIN, token="image_token_index"),
    "video_llava": Sample(
        16, lambda number: {"pixel_values_images": torch.randn(number, 3, 32, 32)}, token="image_token_index"
    ),
    "aria": Sample(4, pixels(), {"projector_patch_to_query_dict": {16: 4}}, token="image_token_index"),
    "cohere2_vision": Sample(4, pixels()),
    "lfm2_vl": Sample(4, shapes),
    "video_llama_3": Sample(8, merged),
    "exaone4_5": _mrope(_IDS, [4, 2, 2], {"fullatt_block_indexes": [0]}),
    "hyperclovax_vision_v2": _mrope(_IDS, [4, 2, 2], {"fullatt_block_indexes": [0]}),
    "qwen2_audio": Sample(
        16, sounds("feature_attention_mask"), {"audio_config": {"max_source_positions": 32}}, token="audio_token_index"
    ),
    "voxtral": Sample(
        64,
        lambda number: {"input_features": torch.randn(number, 16, 128)},
        {"audio_config": {"max_source_positions": 64}},
        token="audio_token_id",
    ),
    "glmasr": Sample(8, sounds("input_features_mask"), token="audio_token_id"),
    "qwen3_5": _mrope(_IDS, [1, 1, 0], {}, partial_rotary_factor=0.25),
    "qwen3_5_moe": _mrope(_IDS, [1, 1, 0], {}, partial_rotary_factor=0.25),
    "paddleocr_vl": replace(_mrope(_IDS, [2, 3, 3], {}), inputs=patches(3, 8, 8)),
    "cohere_compass": replace(_mrope(_IDS, [4, 2, 2], {"deepstack_visual_indexes": [0]}), decoder={}),
    "cosmos3_omni": _mrope(_IDS, [4, 2, 2], {"deepstack_visual_indexes": [0]}),
    "qwen2_vl": _mrope(_IDS, [2, 3, 3], {"embed_dim": 32}),
    "qwen2_5_vl": _mrope(_IDS, [2, 3, 3], {"fullatt_block_indexes": [0]}),
    "qwen3_vl": _mrope(_IDS, [4, 2, 2], {"deepstack_visual_indexes": [0]}),
    "qwen3_vl_moe": _mrope(_IDS, [4, 2, 2], {"deepstack_visual_indexes": [0]}),
    "glm4v": _mrope(_GLM_IDS, [2, 3, 3], {}),
    "glm4v_moe": _mrope(_GLM_IDS, [1, 1, 2], {}, partial_rotary_factor=0.5),
    "glm46v": _mrope(_GLM_IDS, [2, 3, 3], {}),
    "glmga": _mrope(_GLM_IDS, [2, 3, 3], {}),
    "glm_ocr": _mrope(_GLM_IDS, [2, 3, 3], {}),
    "deepseek_vl_hybrid": Sample(16, two_sizes, {"high_res_vision_config": {"global_attn_indexes": [0]}}),
    "fuyu": Sample(4, line),
    "granite_docling": Sample(4, with_masks, {"vision_config": {"scale_factor": 2, "deepstack_visual_indexes": [0]}}),
    "janus": Sample(16, pixels(), {"vision_config": {"projection_dim": 64}, "vq_config": _CODES}),
    "kimi_k25": Sample(8, patches(3, 8, 8), {"projection_hidden_size": 64}),
    "lfm3_vl": Sample(8, patches(384)),
    "muse_glimmer": Sample(8, patches(384), {"out_hidden_size": 256, "projector_hidden_size": 64}),
    "dots3_note": Sample(8, patches(192)),
    "minicpmv4_6": Sample(2, listed, {"vision_config": {"insert_layer_id": 0}}),
    "minicpmv4_7": Sample(2, listed, {"vision_config": {"insert_layer_id": 0}}),
    "minicpm_ocr": Sample(8, listed),
    "gemma4": Sample(
        4,
        placed(4, 192),
        {"text_config": {"use_bidirectional_attention": "vision"}, "vision_config": {"pooling_kernel_size": 2}},
    ),
    "gemma4_unified": Sample(4, placed(2, 768), {"vision_config": {"pooling_kernel_size": 2}}),
    "molmo2": Sample(4, pooled, token="image_patch_id"),
    "phi4_multimodal": Sample(13, crops, token="vision_config.image_token_id"),
    "cosmos3_edge": replace(_mrope(_IDS, [4, 2, 2], {}), inputs=patches(192)),
    "qwen2_5_omni_thinker": _mrope(_IDS, [4, 2, 2], {"fullatt_block_indexes": [0]}),
    "qwen3_omni_moe_thinker": _mrope(_IDS, [4, 2, 2], {"deepstack_visual_indexes": [0]}),
    "gemma3n": Sample(
        4,
        frames,
        {
            "audio_soft_tokens_per_image": 4,
            "vision_config": {"vocab_offset": 88},
            "audio_config": {"input_feat_size": 16, "sscp_conv_channel_size": [8, 8], "vocab_offset": 88},
        },
        token="audio_token_id",
    ),
    "granite_speech": Sample(6, spectra, _SPEECH, token="audio_token_index"),
    "granite_speech_plus": Sample(6, spectra, _SPEECH, token="audio_token_index"),
    "moss_transcribe_diarize": Sample(
        8, sounds("input_features_mask"), {"audio_config": {"max_source_positions": 32}}, token="audio_token_id"
    ),
    "omniasr": Sample(7, wave(2560), {"audio_config": {"conv_dim": [16] * 7}}, token="audio_token_id"),
    "vibevoice_asr": Sample(
        8,
        wave(32),
        {"acoustic_tokenizer_encoder_config": _WAVE, "semantic_tokenizer_encoder_config": _WAVE},
        token="audio_token_id",
    ),
    "qwen3_asr": Sample(
        13, sounds("input_features_mask", 100), {"audio_config": {"output_dim": 64}}, token="audio_token_id"
    ),
    "chameleon": Sample(16, pixels(), {"vocabulary_map": _WORDS_OF_CHAMELEON, "vq_config": _CODES_OF_WORDS}),
    "emu3": Sample(20, sized(), {"vocabulary_map": _WORDS_OF_EMU3, "vq_config": _CODES_OF_WORDS}),
    "granite4_vision": Sample(
        10,
        tiles,
        {
            **_PIN,
            "deepstack_layer_map": [[-1, 0]],
            "spatial_target_layers": [1],
            "downsample_rate": "1/2",
            "qformer_config": {"encoder_hidden_size": 64},
        },
        token="image_token_index",
    ),
}
