"""A model directory like that of a user, of a tiny LLaVA with its real processor, all made here."""

from __future__ import annotations

import base64
import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlavaProcessor, PreTrainedTokenizerFast

from tests.support import media
from tests.support.media import TOKEN
from tests.support.tiny import VOCAB

CONTEXT = 64  # positions that the decoder was trained on
_SIDE, _PATCH = 32, 8
TEMPLATE = (
    "{% for message in messages %}w1 {% for part in message.content %}"
    "{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}{% endfor %}w2 {% endfor %}"
    "{% if add_generation_prompt %}w3{% endif %}"
)


def model():
    return media.build("llava", max_position_embeddings=CONTEXT)


def processor() -> LlavaProcessor:
    """One word, one token: "w5" is 5; an image is 16 of them."""
    words = Tokenizer(models.WordLevel({"<image>" if i == TOKEN else f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="w0",
        pad_token="w0",
        additional_special_tokens=["<image>"],
        model_input_names=["input_ids", "attention_mask"],
    )
    side = {"height": _SIDE, "width": _SIDE}
    return LlavaProcessor(
        _image_processor_class()(size={"shortest_edge": _SIDE}, crop_size=side),
        tokenizer,
        patch_size=_PATCH,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,  # of CLIP, which the strategy leaves out
    )


def _image_processor_class() -> Any:
    for name in ("CLIPImageProcessorPil", "CLIPImageProcessor"):
        if hasattr(transformers, name):
            return getattr(transformers, name)
    pytest.skip("no image processor without torchvision")


def picture(seed: int = 0) -> Image.Image:
    """Random colours."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8))


def url(image: Image.Image) -> str:
    """The picture itself in an address."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def write(folder: Path, **entries: Any) -> Path:
    """Write the model, its processor, and a generation_config.json with `entries` alone."""
    copy.deepcopy(model()).save_pretrained(folder)  # it writes into the config
    processor().save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False, **entries}))
    return folder
