"""Vision-language models fed text: M-RoPE, where all sections turn by the same delta."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from sink_patch import SinkCache, UnsupportedGenerationError
from sink_patch.models.families import media as families_media
from sink_patch.models.families.media import MEDIA
from tests.support.known_gaps import skip_if_model_is_newer
from tests.support.oracle import worst_error
from tests.support.tiny import tokens
from tests.support.versions import parts, rope_settings

SECTIONS = {"qwen2_vl": [2, 3, 3], "qwen2_5_vl": [2, 3, 3], "qwen3_vl": [4, 2, 2], "glm4v": [2, 3, 3]}
_TEXT = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "embed_dim": 32,
    "num_heads": 2,
    "intermediate_size": 32,
    "out_hidden_size": 64,
    "mlp_ratio": 1,
    "patch_size": 4,
    "image_size": 16,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [0],
}


@functools.cache
def model_of(model_type: str) -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": SECTIONS[model_type]}
    special = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    skip_if_model_is_newer(model_type)
    text = rope_settings(parts(CONFIG_MAPPING[model_type])["text_config"], {**_TEXT, "rope_parameters": rope})
    config = AutoConfig.for_model(model_type, text_config=text, vision_config=_VISION, **special)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 1.3 / parameter.shape[-1] ** 0.5)
    return model


@pytest.mark.parametrize("model_type", SECTIONS)
def test_text_is_exact(model_type):
    stream = tokens(160) % 80
    # fresh forwards with a cache: without, 4.57's GLM-4V fails
    assert worst_error(model_of(model_type), stream, [7, 20, *[1] * 90, 5, 9, 1, 1], 12, 3, use_cache=True) < 1e-5


@pytest.mark.parametrize("model_type", SECTIONS)
def test_it_generates(model_type):
    sink = {"cache_implementation": "sink", "window_length": 12, "num_sink_tokens": 3}
    out = model_of(model_type).generate(tokens(6, rows=2) % 80, max_new_tokens=40, return_dict_in_generate=True, **sink)
    assert isinstance(out.past_key_values, SinkCache)
    assert out.past_key_values.get_seq_length() == 45


def test_images_are_refused_by_models_that_are_not_known_to_take_them(monkeypatch):
    model = model_of("qwen2_vl")
    monkeypatch.delitem(MEDIA, "qwen2_vl")
    with pytest.raises(UnsupportedGenerationError, match="pixel_values with a SinkCache, which streams text alone"):
        model(tokens(6), past_key_values=SinkCache(12, 3, model=model), pixel_values=torch.zeros(4, 96))


def test_a_model_may_be_left_out_in_some_versions(monkeypatch):
    seeing, other = (SimpleNamespace(model_type=name) for name in ("llava", "aya_vision"))
    assert families_media.media_of(seeing) is not None
    shim = dataclasses.replace(families_media.installed_shim(), no_media="llava mistral3")
    monkeypatch.setattr(families_media, "installed_shim", lambda: shim)
    assert families_media.media_of(seeing) is None
    assert families_media.media_of(other) is not None
    assert families_media.media_of(SimpleNamespace()) is None
