"""Images whose positions have several coordinates (M-RoPE): sinks, clock and text count positions, not columns."""

from __future__ import annotations

import inspect

import pytest
import torch

from sink_patch import SinkCache, UnsupportedGenerationError
from sink_patch.models.families.media import MEDIA, media_tokens
from sink_patch.streaming.bound import streams_of
from tests.models.test_media import ASKED, BIG, ROWS, SMALL, S, W, built, schedule, streaming
from tests.support import media
from tests.support.media.naive import PlacedCache, Places
from tests.support.media.oracle import Sight, embedded, fresh
from tests.support.oracle import relative_error
from tests.support.replay import cache_name, named_inputs
from tests.support.tiny import tokens

COORDINATES = [name for name in media.SAMPLES if MEDIA[name].coordinates]


def places_of(whole: dict, ids: torch.Tensor) -> Places:
    """Of one row: ids [1, columns] of the whole stream."""
    return Places(whole["position_ids"][-3:, 0], (ids[0] == 90).tolist())


def part(given: dict, start: int, end: int) -> dict:
    """Some columns of a prompt of one row, with the images in them.

    With grids an image has 8 columns and 32 patches; without, all images are in the first part.
    """
    ids, shape = given["input_ids"], given["input_ids"].shape
    images, before = (int((ids[:, slice(*some)] == 90).sum()) // 8 for some in ((start, end), (0, start)))
    some = {name: value[:, start:end] for name, value in given.items() if value.shape == shape}
    del some["attention_mask"]
    if "image_grid_thw" not in given and not start:
        return {**given, **some, "attention_mask": None}
    for name, of_each in (("pixel_values", 32), ("image_grid_thw", 1)):
        if images:
            some[name] = given[name][of_each * before : of_each * (before + images)]
    return some if images else {"input_ids": some["input_ids"]}


@pytest.mark.parametrize(
    ("model_type", "ring", "sinks", "first"),
    [
        ("qwen2_vl", 20, 3, [27]),
        ("qwen2_vl", 8, 11, [27]),
        ("qwen2_vl", 8, 11, [2, 10, 15]),
        ("qwen3_vl", 8, 3, [27]),
        ("glm4v", 12, 7, [1, 1, 25]),
    ],
)
@torch.no_grad()
def test_one_layer_equals_a_fresh_forward_at_the_positions_of_the_cache(model_type, ring, sinks, first):
    """With 11 sinks the first image stays; a short context sets the clock back; images come in later turns too."""
    model = media.build(model_type, ("full_attention",), max_position_embeddings=24)
    streaming(model)
    window = ring + sinks
    given = media.prompt(model, [[2, "image", 3, "image", 2, 22, 4, 1, 11, 1, 1, "image", 1, 12, "image", 1, 30]])
    cache, text, seen = SinkCache(window, sinks, model=model), tokens(1)[:, :0], 0
    whole = embedded(model, given, text)
    places = places_of(whole, given["input_ids"])
    sight = Sight(places.of_image, window, sinks)
    # with a ring of 8 later images come by rule 4, else by rule 3; they leave whole
    for new in [*first, *[1] * 22, 4, 1, 11, 1, 1, 11, *[1] * 12, 11, *[1] * 30]:
        found = model(**part(given, seen, seen + new), **{cache_name(model): cache}).logits[:, -1]
        kept = sight.visible(seen, new)
        wanted = fresh(model, whole["inputs_embeds"][:, kept], position_ids=places.of(kept, sinks)[:, None])
        assert relative_error(found, wanted) < 1e-5, seen
        seen += new
    (row,) = streams_of(cache).rows
    assert (row.lag, len(row.images), seen) == (16, 4, given["input_ids"].shape[1])
    assert row.base


@pytest.mark.parametrize("model_type", COORDINATES)
@torch.no_grad()
def test_several_layers_equal_a_naive_cache(model_type):
    model = built(model_type)
    assert 90 in media_tokens(model.config)
    cache, name, start = streaming(model), cache_name(model), 0
    steps = schedule(cache)
    text_alone = streams_of(cache).facts.one_by_one or "image_grid_thw" not in media.prompt(model, ROWS)
    more = [] if text_alone else [13, 1, 11, 1]
    given = media.prompt(
        model, [[2, "image", 3, "image", 2, sum(steps), *([2, "image", 2, "image", 2] if more else [])]]
    )
    naive = PlacedCache(model, W, S, places_of(embedded(model, given, tokens(1)[:, :0]), given["input_ids"]))
    for new in [given["input_ids"].shape[1] - sum(steps) - sum(more), *steps, *more]:
        piece = part(given, start, start + new)
        inputs = {**piece, **named_inputs(model, naive.start(new))}
        wanted = model(**inputs, use_cache=True, **{name: naive}).logits[:, -1]
        naive.finish()
        assert relative_error(model(**piece, **{name: cache}).logits[:, -1], wanted) < 1e-5, start
        start += new


@pytest.mark.parametrize("model_type", ["qwen2_5_vl"])
def test_below_the_window_the_text_is_that_of_the_default_cache_and_rows_are_as_if_alone(model_type):
    model = built(model_type)
    streaming(model)
    given = media.prompt(model, [[3, "image", 4, "image", 2], [1, "image", 4]])
    wanted, found = (model.generate(**given, **ASKED, **sink) for sink in ({}, BIG))
    assert torch.equal(found.sequences, wanted.sequences)
    for one, other in zip(found.logits, wanted.logits, strict=True):
        assert relative_error(one, other) < 1e-5
    real = given["attention_mask"][1].bool()
    alone = {name: value[1:][:, real] for name, value in given.items() if value.shape == given["input_ids"].shape}
    alone |= {"pixel_values": given["pixel_values"][64:], "image_grid_thw": given["image_grid_thw"][2:]}
    both, one = (model.generate(**inputs, **ASKED, **SMALL) for inputs in (given, alone))
    for found, wanted in zip(both.logits, one.logits, strict=True):
        assert relative_error(found[1:], wanted) < 1e-5


def test_two_streams_do_not_mix_where_they_stand():
    """The model itself remembers the lag of the last prompt that it has read."""
    model = built("qwen2_vl")
    streaming(model)
    texts = [media.prompt(model, [[3, "image", 2]]), media.prompt(model, [[2, "image", 1, "image", 1]], seed=1)]
    asked = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}

    def begun(text):
        out = model.generate(**text, **asked, **BIG)
        return out.sequences, next(value for value in out.values() if isinstance(value, SinkCache))

    def ended(ids, cache):
        return model.generate(torch.cat((ids, tokens(3) % 80), dim=1), past_key_values=cache, **asked).sequences

    wanted = [ended(*begun(text)) for text in texts]
    both = [begun(text) for text in texts]
    for found, one in zip([ended(*stream) for stream in both], wanted, strict=True):
        assert torch.equal(found, one)
    lags = [streams_of(cache).rows[0].lag for _, cache in both]
    assert lags == [4, 8]


def video(model, **others):
    """A prompt with four pairs of frames of 1 x 2 merged patches."""
    ids = torch.tensor([[3, 4, 92, *[91] * 8, 93, 7, 8]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in inspect.signature(type(model).forward).parameters:
        given["mm_token_type_ids"] = 2 * (ids == 91).long()
    return given | {"pixel_values_videos": torch.randn(32, 384), "video_grid_thw": torch.tensor([[4, 2, 4]])} | others


def seconds(count):
    """Of a pair of frames, as the processor of Qwen2.5-VL tells them."""
    return {"second_per_grid_ts": torch.tensor([float(count)])}


@torch.no_grad()
def test_a_video_among_the_sinks_leaves_room_for_text_or_is_refused():
    model = built("qwen2_5_vl", max_position_embeddings=24)
    cache = streaming(model, 16, 12)
    with pytest.raises(UnsupportedGenerationError, match="12 sinks that end at position.*window_length of 16"):
        model(**video(model, **seconds(3)), **{cache_name(model): cache})
    model(tokens(5) % 80, **{cache_name(model): cache})  # a stream of its own
    assert cache.get_seq_length() == 5


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl"])
@torch.no_grad()
def test_videos_may_go_further_than_the_text_behind_them(model_type):
    model = built(model_type)
    cache, name = streaming(model), cache_name(model)
    given = video(model, **(seconds(1) if model_type == "qwen2_5_vl" else {}))
    ids = given["input_ids"]
    asked = {**ASKED, "max_new_tokens": 3}
    wanted, found = (model.generate(**given, **asked, **sink) for sink in ({}, BIG))
    for one, other in zip(found.logits, wanted.logits, strict=True):
        assert relative_error(one, other) < 1e-5
    text = tokens(9) % 80
    whole = embedded(model, given, text)
    coordinates = whole["position_ids"][-3:, 0]
    coordinates[:, ids.shape[1] :] = coordinates[:, ids.shape[1] - 1 : ids.shape[1]] + 1 + torch.arange(9)
    places = Places(coordinates, (torch.cat((ids, text), dim=1)[0] == 91).tolist())
    naive = PlacedCache(model, W, S, places)
    feeds = [given, *[{"input_ids": token} for token in text.split(1, dim=1)]]
    for feed in feeds:
        first = named_inputs(model, naive.start(feed["input_ids"].shape[1]))
        wanted = model(**{**feed, **first}, use_cache=True, **{name: naive}).logits[:, -1]
        naive.finish()
        assert relative_error(model(**feed, **{name: cache}).logits[:, -1], wanted) < 1e-5


@torch.no_grad()
def test_where_images_stand_is_saved_with_the_cache(tmp_path):
    model = built("qwen2_vl")
    cache, name = streaming(model), cache_name(model)
    model(**media.prompt(model, ROWS), **{name: cache})
    cache.save(tmp_path / "cache.safetensors")
    again = SinkCache.load(tmp_path / "cache.safetensors", model=model)
    assert streams_of(again).rows == streams_of(cache).rows
    for token in (tokens(4) % 80).split(1, dim=1):
        found, wanted = (model(token, **{name: one}).logits for one in (again, cache))
        assert torch.equal(found, wanted)


@torch.no_grad()
def test_images_do_not_come_back_and_text_behind_them_does():
    model = built("qwen2_vl")
    streaming(model)
    cache, name, text = SinkCache(100, S, model=model), cache_name(model), tokens(5) % 80
    model(**media.prompt(model, ROWS), **{name: cache})
    wanted = [model(token, **{name: cache}).logits for token in text.split(1, dim=1)]
    assert streams_of(cache).crop(3)
    for token, logits in zip(text[:, 2:].split(1, dim=1), wanted[2:], strict=True):
        assert relative_error(model(token, **{name: cache}).logits, logits) < 1e-5
    assert not streams_of(cache).crop(9)


@pytest.mark.parametrize("entry", ["generate", "forward"])
@torch.no_grad()
def test_images_in_embeddings_are_refused_as_nobody_makes_their_positions(entry):
    model = built("qwen2_vl")
    streaming(model)
    given = media.prompt(model, ROWS)
    whole = embedded(model, given, tokens(1)[:, :0])
    rest = {name: value for name, value in given.items() if name not in ("pixel_values", "image_grid_thw")}
    grids = {"image_grid_thw": given["image_grid_thw"]}
    embeddings = {"inputs_embeds": whole["inputs_embeds"], "attention_mask": given["attention_mask"]}
    placed = {"position_ids": whole["position_ids"]}
    for text in ({**rest, **grids}, {**embeddings, **grids}, {**embeddings, **placed}):
        cache = SinkCache(200, S, model=model)
        call, more = (model, {cache_name(model): cache}) if entry == "forward" else (model.generate, {**ASKED, **BIG})
        with pytest.raises(UnsupportedGenerationError, match="and no images, which alone tell"):
            call(**text, **more)
        assert cache.get_seq_length() == 0
    plain = torch.arange(24).expand(3, 1, -1)
    text = {"input_ids": tokens(24) % 80, "position_ids": plain}
    wanted, found = (model(**text, **more).logits for more in ({}, {cache_name(model): cache}))
    assert relative_error(found, wanted) < 1e-5


@torch.no_grad()
def test_positions_that_nobody_has_seen_are_no_guess():
    """In a graph the hook before the decoder does not run: here it is as if there were none."""
    model = built("qwen2_vl")
    cache, name = streaming(model), cache_name(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams_of(cache).coordinates, "note", lambda *_: None)
        with pytest.raises(UnsupportedGenerationError, match="cannot see there at which positions"):
            model(**media.prompt(model, ROWS), **{name: cache})
    assert cache.get_seq_length() == 0
    wanted = model(**media.prompt(model, ROWS), use_cache=False).logits[:, -1]
    assert relative_error(model(**media.prompt(model, ROWS), **{name: cache}).logits[:, -1], wanted) < 1e-5
