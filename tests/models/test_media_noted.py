"""Which images count as read: of new text in a stream, of a prompt that fails, of a config that is used twice."""

from __future__ import annotations

import pytest
import torch

from sink_patch import SinkCache, UnsupportedGenerationError, stream
from sink_patch.models.entries import decoder_of
from sink_patch.streaming.bound import streams_of
from sink_patch.streaming.media.images import UNKNOWN, digests_by_row, images_among
from tests.models.test_media import built, skip_without_later_images
from tests.support import media
from tests.support.media import directory
from tests.support.replay import cache_name

SIZES = {"window_length": 60, "num_sink_tokens": 2}
ASKED = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": [90]}


@pytest.fixture(autouse=True, scope="module")
def later_images():
    skip_without_later_images()


def images_of(cache: SinkCache) -> tuple[str, ...]:
    return streams_of(cache).rows[0].images


@pytest.mark.parametrize("more", [2, 24], ids=["shorter", "longer"])
@pytest.mark.parametrize("same", [True, False], ids=["the same picture", "another one"])
def test_new_text_in_a_stream_brings_its_image_however_long_it_is(same, more):
    """Longer than what was read, it could be taken for a history, of which the picture was read."""
    model, tokenizer = directory.model(), directory.processor().tokenizer
    pixels = [
        torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1 if same else 2)
    ]
    words = "<image> " * 16
    text = f"w8 {words}" + " ".join(f"w{10 + index}" for index in range(more))

    def begun() -> SinkCache:
        first = stream(model, tokenizer, f"w5 {words}w6 w7", pixel_values=pixels[0], **SIZES, **ASKED)
        list(first)
        return first.cache

    one, other = begun(), begun()
    found = list(stream(model, tokenizer, text, pixel_values=pixels[1], past_key_values=one, **ASKED))
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    mask = torch.ones(1, other.get_seq_length() + ids.shape[1], dtype=torch.long)
    given = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels[1], cache_name(model): other}
    wanted = model.generate(**given, **ASKED)[0, ids.shape[1] :].tolist()
    assert "".join(found).split() == [f"w{token}" for token in wanted]
    assert len(images_of(one)) == len(images_of(other)) == 2


def test_a_prompt_that_fails_between_its_pieces_does_not_count_its_images_as_read():
    model, runs = directory.model(), []
    given, cache = media.prompt(model, [[2, "image", 2, "image", 3]]), SinkCache(60, 2, model=model)

    def fail(*_):
        runs.append(None)
        if len(runs) == 2:
            raise RuntimeError("out of memory")

    hook = decoder_of(model).layers[0].register_forward_pre_hook(fail)
    asked = {**ASKED, "prefill_chunk_size": 20, cache_name(model): cache}
    with pytest.raises(RuntimeError, match="out of memory"):
        model.generate(**given, **asked)
    hook.remove()
    assert images_of(cache) == (UNKNOWN,)
    with pytest.raises(UnsupportedGenerationError, match="cannot be said which of them"):
        model.generate(**given, **asked)
    cache.reset()
    model.generate(**given, **asked)
    assert len(images_of(cache)) == 2
    assert UNKNOWN not in images_of(cache)


def test_a_config_that_was_prepared_for_a_call_may_be_used_for_another():
    model = built("llava")
    one, other = (media.prompt(model, [[2, "image", 3]], seed=seed) for seed in range(2))
    asked = {**ASKED, "cache_implementation": "sink", **SIZES, "return_dict_in_generate": True}
    config, _ = model._prepare_generation_config(None, **one, **asked)
    caches = [
        next(value for value in model.generate(**given, **settings).values() if isinstance(value, SinkCache))
        for given, settings in ((one, asked), (other, asked), (other, {"generation_config": config}))
    ]
    assert images_of(caches[0]) != images_of(caches[1]) == images_of(caches[2])


def test_images_that_cannot_be_told_apart_are_not_passed_over():
    """Beside a video that can: the row would know the video alone, and say that it knows all."""
    model = built("qwen2_vl")
    video = {"pixel_values_videos": torch.randn(32, 384), "video_grid_thw": torch.tensor([[4, 2, 4]])}
    assert images_among(model, video) is not None
    for image in ({"mm_encoder_outputs": {"image": torch.randn(8, 64)}}, {"pixel_values": [torch.randn(32, 384)]}):
        assert images_among(model, {**video, **image}) is None
    sizes = {"pixel_values": torch.randn(2, 3, 32, 32), "image_sizes": [[32, 32], [32]]}
    assert images_among(built("mistral3"), sizes) is None


def test_images_of_different_sizes_in_a_batch_are_of_unknown_rows():
    """Of 20 and 10 ids three images of 20, 5 and 5 make 20 | 5, 5; by their number alone it could be 20, 5 | 5."""
    model = built("mistral3")
    ids = torch.tensor([[90] * 20, [0] * 10 + [90] * 10])
    sizes = torch.tensor([[32, 32], [16, 16], [16, 16]])
    found = images_among(model, {"pixel_values": torch.randn(3, 3, 32, 32), "image_sizes": sizes})
    assert digests_by_row(found, ids, model.config) == [(UNKNOWN,), (UNKNOWN,)]
    alike = images_among(model, {"pixel_values": torch.randn(3, 3, 32, 32), "image_sizes": sizes[:1].expand(3, 2)})
    assert [len(row) for row in digests_by_row(alike, ids, model.config)] == [2, 1]


@pytest.mark.parametrize(
    ("model_type", "beside"),
    [
        ("llava_onevision", {"batch_num_images": torch.tensor([1])}),
        ("aria", {"pixel_mask": torch.ones(1, 32, 32, dtype=torch.bool)}),
    ],
)
def test_what_processors_write_beside_images_goes_with_a_history(model_type, beside):
    model = built(model_type)
    first, text = media.prompt(model, [[2, "image", 3]]) | beside, media.prompt(model, [[4]], seed=6)
    sizes = {**SIZES, "window_length": 150}
    out = model.generate(**first, **ASKED, **sizes, cache_implementation="sink", return_dict_in_generate=True)
    cache = next(value for value in out.values() if isinstance(value, SinkCache))
    ids = torch.cat((out.sequences, text["input_ids"]), dim=1)
    whole = {**first, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    wanted = model.generate(**whole, **ASKED)
    assert torch.equal(model.generate(**whole, **ASKED, **{cache_name(model): cache}), wanted)
