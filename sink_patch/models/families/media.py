"""Which models may be given images and sounds, and by which arguments: data only, each proven by a tiny model.

Such a model is one whose processor writes a token for each column of an image, which the model puts in its place. Then
images are columns like any others, and the cache has nothing to learn. (tests/models/test_media.py)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sink_patch.compat import installed_shim


@dataclass(frozen=True)
class Kind:
    """Images, videos or sounds.

    Args:
        name: in the settings of the ids that stand for them.
        words: for people.
        inputs: arguments of which one holds them, one after the other; the first is the usual one.
        beside: arguments that tell something of each.
        grids: the one among these that tells of how many patches each of them is, where they are patches.
    """

    name: str
    words: str
    inputs: tuple[str, ...]
    beside: frozenset[str]
    grids: str = ""


KINDS = (
    Kind(
        "image",
        "images",
        ("pixel_values", "pixel_values_images", "image_pixel_values"),
        frozenset({"image_sizes", "image_grid_thw", "image_merge_sizes", "spatial_shapes", "image_position_ids"})
        | frozenset({"pixel_attention_mask", "pixel_mask", "image_attention_mask", "high_res_pixel_values"}),
        "image_grid_thw",
    ),
    Kind(
        "video",
        "videos",
        ("pixel_values_videos",),
        frozenset({"video_grid_thw", "video_merge_sizes", "second_per_grid_ts"}),
        "video_grid_thw",
    ),
    Kind(
        "audio",
        "sounds",
        ("input_features", "input_values"),
        frozenset({"feature_attention_mask", "input_features_mask", "padding_mask"}),
    ),
)


EACH, ALL, PROMPT = "each", "all", "prompt"
_SEE = {EACH: "see themselves", ALL: "see each other", PROMPT: "see the whole prompt"}


@dataclass(frozen=True)
class Media:
    """How the images and sounds of a model reach its forward.

    Args:
        inputs: arguments that hold them.
        both_ways: what sees itself in both directions, by masks that the model makes of a whole prompt: `EACH` image
            by itself, `ALL` images as one, or the `PROMPT` with its text; none of them where it is "".
        by_blocks: whether its forward masks them by blocks in all layers alike, unlike what it makes for `generate` to
            compile.
        coordinates: whether positions have several coordinates (M-RoPE), which the model makes of a whole prompt.
        by_rows: whether images are given row by row, [rows, images, ...], zeros where there are none.
        refusal: why it is not served with them; None: it is.
    """

    inputs: frozenset[str]
    both_ways: str = ""
    by_blocks: bool = False
    coordinates: bool = False
    by_rows: bool = False
    refusal: str | None = None

    def __str__(self) -> str:
        words = [kind.words for kind in KINDS if self.inputs.intersection(kind.inputs)]
        how = " and ".join(words) + " are columns like any others"
        if self.both_ways:
            how += f", and {_SEE[self.both_ways]} in both directions"
        return how + (", at positions of three coordinates" if self.coordinates else "")


_IMAGES, _VIDEOS = "pixel_values", "pixel_values pixel_values_videos"
_SOUNDS, _WAVES = "input_features", "input_values"


def _each(model_types: str, inputs: str, **more: Any) -> Iterable[tuple[str, Media]]:
    return [(name, Media(frozenset(inputs.split()), **more)) for name in model_types.split()]


def _left(reason: str, model_types: str) -> Iterable[tuple[str, Media]]:
    return _each(model_types, "", refusal=reason)


MEDIA: dict[str, Media] = dict(
    [
        *_each("llava vipllava aya_vision got_ocr2 pp_chart2table internvl deepseek_vl ovis2 qianfan_ocr", _IMAGES),
        *_each("mistral3 lighton_ocr llava_next llava_onevision aria cohere2_vision", _IMAGES),
        *_each("idefics2 idefics3 smolvlm granite_docling", _IMAGES, by_rows=True),
        *_each("lfm2_vl video_llama_3 exaone4_5 hyperclovax_vision_v2", _IMAGES),
        *_each("llava_next_video", _IMAGES),
        *_each("video_llava", "pixel_values pixel_values_images"),
        *_each("fuyu janus kimi_k25 lfm3_vl muse_glimmer dots3_note minicpmv4_6 minicpm_ocr", _IMAGES),
        *_each("chameleon emu3 granite4_vision", _IMAGES),
        *_each("deepseek_vl_hybrid", "pixel_values high_res_pixel_values"),
        *_each("phi4_multimodal", "image_pixel_values image_attention_mask"),
        *_each("qwen2_audio glmasr voxtral gemma3n granite_speech granite_speech_plus", _SOUNDS),
        *_each("moss_transcribe_diarize qwen3_asr", _SOUNDS),
        *_each("omniasr vibevoice_asr", _WAVES),
        *_each("gemma3 shieldgemma2 gemma4", _IMAGES, both_ways=EACH),
        *_each("gemma4_unified", _IMAGES, both_ways=EACH, by_blocks=True),
        *_each("molmo2", _IMAGES, both_ways=ALL),
        *_each("paligemma", _IMAGES, both_ways=PROMPT),
        *_each("qwen2_vl qwen2_5_vl", _VIDEOS, coordinates=True),
        *_each("qwen3_vl qwen3_vl_moe glm4v glm4v_moe glm46v glmga glm_ocr paddleocr_vl", _IMAGES, coordinates=True),
        *_each("qwen3_5 qwen3_5_moe cosmos3_omni cosmos3_edge cohere_compass minicpmv4_7", _IMAGES, coordinates=True),
        *_each("qwen2_5_omni_thinker qwen3_omni_moe_thinker", _IMAGES, coordinates=True),
        *_left("it is an encoder-decoder model", "florence2 pix2struct pp_formulanet t5gemma2 udop"),
        *_left("it is an encoder-decoder model", "vision-encoder-decoder"),
        *_left("it attends to the image beside the text, in every forward", "idefics evolla"),
        *_left("it is given sound with each token", "voxtral_realtime kyutai_speech_to_text"),
        *_left("it puts two models together; its decoder streams by itself", "blip-2 instructblip instructblipvideo"),
        *_left("it puts several models together; its thinker streams by itself", "qwen2_5_omni qwen3_omni_moe"),
        *_left("its cache has layers of a kind of its own", "unlimited_ocr"),
        *_left("it writes blocks by diffusion, not token by token", "diffusion_gemma"),
        *_left("it makes movements, not text", "pi0"),
        *_left("its own forward fails in this transformers", "llama4"),
        *_left("its encoder is of timm, and not proven", "fast_vlm perception_lm"),
    ]
)
"""Of the others that see or hear nobody has proven it."""


def media_of(config: Any) -> Media | None:
    """How a model with this config takes images and sounds; None: not known, or not in this transformers."""
    media = MEDIA.get(getattr(config, "model_type", ""))
    if media is None or media.refusal is not None:
        return None
    return None if config.model_type in installed_shim().no_media.split() else media


def media_tokens(config: Any, kinds: Iterable[Kind] = KINDS) -> frozenset[int]:
    """The ids that stand for columns of images, videos and sounds, or of some of these."""
    names = [f"{kind.name}_token_{end}" for kind in kinds for end in ("id", "index")]
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))]
    found = (getattr(part, name, None) for part in parts for name in names)
    return frozenset(token for token in found if isinstance(token, int))


def prompt_is_one(config: Any) -> bool:
    """Whether images, or all of a prompt, see what stands behind them in it: read with less behind, they are others."""
    media = media_of(config)
    return media is not None and media.both_ways in (ALL, PROMPT)
