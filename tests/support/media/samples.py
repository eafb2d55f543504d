"""One record for each model type: what its tiny config needs, its pixels, and how many ids stand for an image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

Inputs = Callable[[int], dict[str, Any]]


@dataclass(frozen=True)
class Sample:
    """What is special about a model type.

    Args:
        columns: ids that stand for an image.
        inputs: from a number of images to the tensors of them.
        settings: of the config, nested for its parts.
        decoder: settings of the decoder's config.
        token: the name of the setting that holds the id.
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


def _pixels(size: int = 32) -> Inputs:
    return lambda number: {"pixel_values": torch.randn(number, 3, size, size)}


def _sized(size: int = 32) -> Inputs:
    return lambda number: {
        "pixel_values": torch.randn(number, 3, size, size),
        "image_sizes": torch.tensor([[size, size]] * number),
    }


def _in_row(size: int = 32) -> Inputs:
    """All in one row of a batch."""
    return lambda number: {"pixel_values": torch.randn(1, number, 3, size, size)}


def _tiles(number: int) -> dict[str, Any]:
    """A whole image and one part of it."""
    return {"pixel_values": torch.randn(number, 2, 3, 32, 32), "image_sizes": torch.tensor([[32, 32]] * number)}


def _shapes(number: int) -> dict[str, Any]:
    return {
        "pixel_values": torch.randn(number, 16, 192),
        "spatial_shapes": torch.tensor([[4, 4]] * number),
        "pixel_attention_mask": torch.ones(number, 16, dtype=torch.long),
    }


def _merged(number: int) -> dict[str, Any]:
    return {**_patches(192)(number), "image_merge_sizes": torch.tensor([2] * number)}


def _sounds(mask: str) -> Inputs:
    """Sounds of 64 frames."""
    return lambda number: {
        "input_features": torch.randn(number, 16, 64),
        mask: torch.ones(number, 64, dtype=torch.long),
    }


def _patches(*shape: int) -> Inputs:
    """Two rows of four merged patches, 2 x 2 each, of such a shape."""
    return lambda number: {
        "pixel_values": torch.randn(32 * number, *shape),
        "image_grid_thw": torch.tensor([[1, 4, 8]] * number),
    }


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
    return Sample(8, _patches(384), settings, {"rope_parameters": rope}, around=([_START], [_END]))


_PIN = {"image_grid_pinpoints": [[32, 32]]}
_FOUR = {"mm_tokens_per_image": 4}

SAMPLES: dict[str, Sample] = {
    "llava": Sample(16, _pixels(), token="image_token_index"),
    "vipllava": Sample(16, _pixels(), {"vision_feature_layers": [-1, -1, -1, -2, -2]}, token="image_token_index"),
    "aya_vision": Sample(4, _pixels(), token="image_token_index"),
    "got_ocr2": Sample(1, _pixels(), token="image_token_index"),
    "internvl": Sample(4, _pixels()),
    "deepseek_vl": Sample(16, _pixels()),
    "ovis2": Sample(16, _pixels()),
    "qianfan_ocr": Sample(4, _pixels()),
    "gemma3": Sample(4, _pixels(), _FOUR, token="image_token_index"),
    "shieldgemma2": Sample(4, _pixels(), _FOUR, token="image_token_index"),
    "pp_chart2table": Sample(1, _pixels()),
    "paligemma": Sample(
        16, _pixels(), {"projection_dim": 64, "vision_config": {"projection_dim": 64}}, token="image_token_index"
    ),
    "idefics2": Sample(64, _in_row()),
    "idefics3": Sample(4, _in_row(), {"scale_factor": 2}),
    "smolvlm": Sample(4, _in_row(), {"scale_factor": 2}),
    "mistral3": Sample(4, _sized(), token="image_token_index"),
    "lighton_ocr": Sample(4, _sized()),
    "llava_next": Sample(36, _tiles, _PIN, token="image_token_index"),
    "llava_onevision": Sample(36, _tiles, _PIN, token="image_token_index"),
    "llava_next_video": Sample(36, _tiles, _PIN, token="image_token_index"),
    "video_llava": Sample(
        16, lambda number: {"pixel_values_images": torch.randn(number, 3, 32, 32)}, token="image_token_index"
    ),
    "aria": Sample(4, _pixels(), {"projector_patch_to_query_dict": {16: 4}}, token="image_token_index"),
    "cohere2_vision": Sample(4, _pixels()),
    "lfm2_vl": Sample(4, _shapes),
    "video_llama_3": Sample(8, _merged),
    "exaone4_5": _mrope(_IDS, [4, 2, 2], {"fullatt_block_indexes": [0]}),
    "hyperclovax_vision_v2": _mrope(_IDS, [4, 2, 2], {"fullatt_block_indexes": [0]}),
    "qwen2_audio": Sample(
        16, _sounds("feature_attention_mask"), {"audio_config": {"max_source_positions": 32}}, token="audio_token_index"
    ),
    "voxtral": Sample(
        64,
        lambda number: {"input_features": torch.randn(number, 16, 128)},
        {"audio_config": {"max_source_positions": 64}},
        token="audio_token_id",
    ),
    "glmasr": Sample(8, _sounds("input_features_mask"), token="audio_token_id"),
    "qwen3_5": _mrope(_IDS, [1, 1, 0], {}, partial_rotary_factor=0.25),
    "qwen3_5_moe": _mrope(_IDS, [1, 1, 0], {}, partial_rotary_factor=0.25),
    "paddleocr_vl": replace(_mrope(_IDS, [2, 3, 3], {}), inputs=_patches(3, 8, 8)),
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
}
