"""What tells two calls with images of the same ids apart: which images, types of tokens, masks."""

from __future__ import annotations

import pytest
import torch

import sink_patch
from tests.kept.seeing import NEW, Talk, watched
from tests.models.test_media import built, skip_without_later_images, streaming
from tests.models.test_media_talks import ANSWER, given
from tests.support import media
from tests.support.oracle import relative_error

SINK = {"cache_implementation": "sink", "window_length": 100, "num_sink_tokens": 3, "keep_streams": 4}


def asked_of(model, seed=0, image=0):
    """Of a prompt of one image."""
    ids = media.prompt(model, [[5, "image", 4]], seed=seed)["input_ids"]
    return given(model, ids, [media.images(model, 1, seed=image)], ids.shape[1])


def test_two_images_of_the_same_ids_are_kept_beside_each_other():
    model = built("llava")
    streaming(model)
    for image in (0, 1, 0):
        model.generate(**asked_of(model, image=image), **{**ANSWER, "max_new_tokens": 1}, **SINK)
    assert len(sink_patch.kept_streams) == 2


@pytest.mark.parametrize("model_type", ["gemma3", "qwen2_vl"])
def test_types_that_say_more_than_ids_are_not_kept(model_type):
    """An image that is called text sees itself in one direction, or stands at other positions."""
    skip_without_later_images()
    model = built(model_type)
    streaming(model)
    right = asked_of(model)
    (name,) = {"token_type_ids", "mm_token_type_ids"} & right.keys()
    with watched(model) as seen:
        talk = Talk(model, seen, {name: value for name, value in SINK.items() if name != "cache_implementation"})
        model.generate(**{**right, name: torch.zeros_like(right[name])}, **ANSWER, **SINK)
        assert len(sink_patch.kept_streams) == 0
        _, logits = talk.ask(right["input_ids"], [media.images(model, 1, seed=0)])
        wanted = torch.stack(model.generate(**right, **ANSWER).logits, dim=1)
        assert relative_error(logits, wanted) < 1e-5
    assert len(sink_patch.kept_streams) == 1


def test_padding_that_transformers_finds_by_itself_is_not_kept():
    """Which it does when the call has begun."""
    model = built("llava")
    streaming(model)
    inputs = asked_of(model)
    alone = model.generate(**inputs, **ANSWER).sequences
    padded = {**inputs, "input_ids": torch.nn.functional.pad(inputs["input_ids"], (4, 0), value=96)}
    del padded["attention_mask"]
    for _ in range(2):
        text = model.generate(**padded, **ANSWER, **SINK, pad_token_id=96, eos_token_id=1).sequences
        assert torch.equal(text[:, 4:], alone)
        assert text.shape[1] == padded["input_ids"].shape[1] + NEW
    assert len(sink_patch.kept_streams) == 0
