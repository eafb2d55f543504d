"""An image in the ring leaves whole: once its first token has left, the rest of it is not seen any more."""

from __future__ import annotations

import random

import pytest
import torch
from torch._dynamo.utils import counters

from sink_patch import CacheStateError, SinkCache
from sink_patch.streaming.bound import streams_of
from tests.generation.test_compiled import fresh_graphs as fresh_graphs  # noqa: PLC0414
from tests.generation.test_compiled import graph_config
from tests.models.test_media import ASKED, skip_without_later_images, streaming, takes_images_later
from tests.models.test_media_coordinates import places_of
from tests.models.test_media_talks import given
from tests.support import media
from tests.support.media.oracle import Sight, embedded, fresh
from tests.support.oracle import relative_error
from tests.support.replay import ReplayCache, cache_name, named_inputs
from tests.support.tiny import tokens

S = 3
SIZE = {"llava": 16, "qwen2_vl": 8, "glm4v": 8, "gemma3": 4, "mistral3": 4}
"""Columns of an image."""


@pytest.fixture(scope="module", autouse=True)
def later_images():
    skip_without_later_images()


def one_layer(model_type, context=40):
    """The clock is set back in each stream."""
    model = media.build(model_type, ("full_attention",), max_position_embeddings=context)
    streaming(model)
    if not takes_images_later(model):
        pytest.skip("images of later turns are refused by name with this transformers")
    return model


class Text:
    """A text with images, some forwards of it that cut none, and what each of them sees."""

    def __init__(self, model, parts, images):
        self._read(model, media.prompt(model, [parts])["input_ids"], images)

    @classmethod
    def of(cls, model, ids, images):
        text = object.__new__(cls)
        text._read(model, ids, images)
        return text

    def _read(self, model, ids, images):
        self.model, self.ids, self.images = model, ids, images
        joined = given(model, self.ids, images, self.ids.shape[1])
        whole = embedded(model, joined, tokens(1)[:, :0])
        self.embeddings, self.of_image = whole["inputs_embeds"], (self.ids == media.TOKEN)[0].tolist()
        several = getattr(whole.get("position_ids"), "ndim", 0) == 3
        self.places = places_of(whole, self.ids) if several else None

    def inputs(self, start, end):
        ids, size = self.ids[:, start:end], SIZE[self.model.config.model_type]
        before, count = sum(self.of_image[:start]) // size, sum(self.of_image[start:end]) // size
        return {**given(self.model, ids, self.images[before : before + count], end), "attention_mask": None}

    def wanted(self, kept, sinks):
        placed = {} if self.places is None else {"position_ids": self.places.of(kept, sinks)[:, None]}
        return fresh(self.model, self.embeddings[:, kept], **placed)

    def steps(self, rng, window):
        """A first forward, mostly single tokens, some pieces; none ends within an image."""
        steps = [self.whole(0, rng.choice([1, 5, window, window + 9]))]
        while (at := sum(steps)) < len(self.of_image):
            steps.append(self.whole(at, rng.choice([1, 1, 1, 1, 1, 3, window - S, window + 4])))
        return steps

    def whole(self, start, count):
        end = min(start + count, len(self.of_image))
        while end < len(self.of_image) and self.of_image[end - 1] and self.of_image[end]:
            end += 1
        return end - start


def random_text(model, rng, images=5):
    parts = [rng.randint(0, 6)]
    for _ in range(images):
        parts += ["image", rng.choice([1, 2, 5, 12, 30])]
    return Text(model, [*parts, 60], [media.images(model, 1, seed=seed) for seed in range(images)])


@torch.no_grad()
def worst_error(text, sight, cache, steps, start=0):
    worst = 0.0
    for new in steps:
        found = text.model(**text.inputs(start, start + new), **{cache_name(text.model): cache}).logits[:, -1]
        kept = sight.visible(start, new)
        worst = max(worst, relative_error(found, text.wanted(kept, cache.num_sink_tokens)))
        start += new
    return worst


@pytest.mark.parametrize("model_type", ["llava", "qwen2_vl", "glm4v", "mistral3"])
def test_no_random_text_with_images_is_a_counterexample(model_type):
    """Windows from shorter than an image on, sinks that hold a part of one or several."""
    model, left = one_layer(model_type), 0
    for seed in range(12):
        rng = random.Random(seed)
        window, sinks = rng.randint(SIZE[model_type], 45), rng.choice([0, 3, 3, SIZE[model_type] + 2])
        window = max(window, sinks + 2)
        text = random_text(model, rng)
        cache = SinkCache(window, sinks, model=model)
        sight = Sight(text.of_image, window, sinks)
        assert worst_error(text, sight, cache, text.steps(rng, window)) < 1e-5, (seed, window, sinks)
        left += sight.floor > 0
    assert left >= 6


@pytest.mark.parametrize("model_type", ["llava", "qwen2_vl"])
def test_what_is_held_says_so_and_an_image_longer_than_the_ring_leaves_token_by_token(model_type):
    model, size = one_layer(model_type), SIZE[model_type]
    for ring in (size, size - 1):
        text = Text(model, [S + 2, "image", 40], [media.images(model, 1)])
        cache, sight = SinkCache(ring + S, S, model=model), Sight(text.of_image, ring + S, S)
        end = 1 + max(place for place, is_image in enumerate(text.of_image) if is_image)
        assert worst_error(text, sight, cache, [end]) < 1e-5
        assert worst_error(text, sight, cache, [1], end) < 1e-5
        assert cache.window()[0].recent == (range(end, end + 1) if ring == size else range(end + 1 - ring, end + 1))
        assert worst_error(text, sight, cache, [1] * 30, end + 1) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llava", "qwen2_vl"])
def test_copies_files_and_text_that_is_taken_back(model_type, tmp_path):
    model, name = one_layer(model_type), cache_name(one_layer(model_type))
    rng, window = random.Random(3), 30
    text = random_text(model, rng)
    steps, cache, sight = text.steps(rng, window), SinkCache(window, S, model=model), Sight(text.of_image, window, S)
    for stop in range(0, len(steps), 9):
        start = sum(steps[:stop])
        cache.save(tmp_path / "cache.safetensors")
        for one in (SinkCache.load(tmp_path / "cache.safetensors", model=model), cache.clone()):
            twin = Sight(text.of_image, window, S)
            twin.floor = sight.floor
            assert worst_error(text, twin, one, steps[stop:], start) < 1e-5
        assert worst_error(text, sight, cache, steps[stop : stop + 9], start) < 1e-5
    assert sight.floor
    with pytest.raises(CacheStateError, match="is gone"):
        cache.crop(-cache.get_seq_length() + S)
    cache.activate_past_recording(6)
    text = tokens(20) % 80
    wanted = [model(token, **{name: cache}).logits for token in text.split(1, dim=1)]
    cache.crop(-6)
    for token, logits in zip(text[:, -6:].split(1, dim=1), wanted[-6:], strict=True):
        assert relative_error(model(token, **{name: cache}).logits, logits) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llava", "qwen2_vl"])
def test_text_behind_images_is_taken_back_as_by_drafts(model_type):
    """What has left for it stays away. Six tokens at most, which may come at once."""
    model, name = one_layer(model_type), cache_name(one_layer(model_type))
    for seed in range(4):
        rng, text = random.Random(seed), random_text(model, random.Random(seed))
        window = rng.randint(SIZE[model_type] + S, 40)
        cache, sight = SinkCache(window, S, model=model), Sight(text.of_image, window, S)
        cache.activate_past_recording(6)
        ends = [place + 1 for place, is_image in enumerate(text.of_image[:-1]) if is_image]
        start, low = 0, 0
        while start < len(text.of_image) - 6:
            new = text.whole(start, rng.choice([1, 1, 1, 2, 6]))
            found = model(**text.inputs(start, start + new), **{name: cache}).logits[:, -1]
            assert relative_error(found, text.wanted(sight.visible(start, new), S)) < 1e-5, (seed, start)
            start += new
            low = max([low, start - 6, *(end for end in ends if end <= start)])
            if back := rng.choice([0, 0, rng.randint(0, start - low)]):
                cache.crop(-back)
                start -= back
        assert sight.floor


@pytest.mark.parametrize("model_type", ["llava", "qwen2_vl"])
def test_rows_of_a_batch_are_as_if_alone(model_type):
    model = media.build(model_type, max_position_embeddings=64)
    streaming(model)
    size, parts = SIZE[model_type], [[3, "image", 4, "image", 2], [5, "image", 4]]
    sink = {"cache_implementation": "sink", "window_length": 40, "num_sink_tokens": S}
    asked = {**ASKED, "max_new_tokens": 50, "suppress_tokens": list(range(88, 96)), **sink}
    both, columns = media.prompt(model, parts), {"input_ids", "token_type_ids", "mm_token_type_ids"}
    found, first = model.generate(**both, **asked), 0
    for row, of_row in enumerate(parts):
        images = slice(first, first := first + of_row.count("image"))
        real = both["attention_mask"][row].bool()
        alone = {name: both[name][row : row + 1, real] for name in columns & both.keys()}
        each = len(both["pixel_values"]) // 3
        alone["pixel_values"] = both["pixel_values"].unflatten(0, (3, each))[images].flatten(0, 1)
        if "image_grid_thw" in both:
            alone["image_grid_thw"] = both["image_grid_thw"][images]
        wanted = model.generate(**alone, **asked)
        (cache,) = (value for value in wanted.values() if isinstance(value, SinkCache))
        assert streams_of(cache).rows[0].dropped >= size
        for one, other in zip(found.logits, wanted.logits, strict=True):
            assert relative_error(one[row : row + 1], other) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("local", [6, 20])
def test_rows_of_a_batch_keep_what_their_sliding_windows_see(local):
    """One mask serves both kinds of layers. So an image leaves token by token until enough is left."""
    window, layers = 22, ["sliding_attention", "full_attention"]
    model = media.build("gemma3", layer_types=layers, sliding_window=local, max_position_embeddings=48)
    streaming(model)
    both = media.prompt(model, [[7, "image", 2, "image", 12], [5, "image", 3]])
    cache, texts = SinkCache(window, S, model=model), tokens(80).view(2, 40) % 80
    kept = next(layer.kind.capacity for layer in cache.layers if layer.kind.local) - 1
    naive, found = [], [model(**both, **{cache_name(model): cache}).logits[:, -1]]
    found += [model(token, **{cache_name(model): cache}).logits[:, -1] for token in texts.split(1, dim=1)]
    for row, images in enumerate(((0, 2), (2, 3))):
        real = both["attention_mask"][row].bool()
        given_row = {name: both[name][row : row + 1, real] for name in ("input_ids", "token_type_ids")}
        ids = torch.cat((given_row["input_ids"], texts[row : row + 1]), dim=1)
        sight = Sight((ids == media.TOKEN)[0].tolist(), window, S, local=kept)
        naive = ReplayCache(model, window, S, sight)
        given_row["pixel_values"] = both["pixel_values"][slice(*images)]
        for number, piece in enumerate([given_row, *({"input_ids": one} for one in texts[row : row + 1].split(1, 1))]):
            inputs = {**piece, **named_inputs(model, naive.start(piece["input_ids"].shape[1]))}
            wanted = model(**inputs, use_cache=True, **{cache_name(model): naive}).logits[:, -1]
            naive.finish()
            assert relative_error(found[number][row : row + 1], wanted) < 1e-5, (row, number)
        assert sight.floor


@pytest.mark.parametrize("model_type", ["llava", "qwen2_vl"])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # of masks of 4.53 to 4.57
def test_compiled_decoding(model_type):
    model = one_layer(model_type)
    prompt = media.prompt(model, [[4, "image", 3, "image", 2]])
    sink = {"cache_implementation": "sink", "window_length": 38, "num_sink_tokens": S}
    asked = {**ASKED, "max_new_tokens": 60, "suppress_tokens": list(range(88, 96)), **sink}
    found, wanted = (model.generate(**prompt, **asked, **more) for more in ({"compile_config": graph_config()}, {}))
    assert counters["stats"]["unique_graphs"] == 1
    for one, other in zip(found.logits, wanted.logits, strict=True):
        assert relative_error(one, other) < 1e-5


def test_an_image_in_a_message_longer_than_the_window_leaves_whole():
    """With evict="turns": a message of 60 tokens, whose single tokens leave, and an image in it."""
    model, mark = one_layer("llava"), torch.tensor([[86]])
    text = Text(model, [S + 3, "image", 44, "image", 4], [media.images(model, 1, seed=seed) for seed in range(2)])
    text.ids[:, [4, 65]] = mark  # where messages begin: the second one behind the first image
    text = Text.of(model, text.ids, text.images)
    cache = SinkCache(30, S, model=model, evict="turns", turn_start=[86])
    sight = Sight(text.of_image, 30, S)
    assert worst_error(text, sight, cache, [22, *[1] * 42]) < 1e-5
    assert sight.floor == 22
    assert streams_of(cache).rows[0].dropped == 22 - S


def test_text_alone_asks_for_nothing():
    """Nor does a text whose images have left."""
    model = one_layer("llava")
    cache, name = SinkCache(24, S, model=model), cache_name(model)
    with torch.no_grad():
        model(**media.prompt(model, [[4, "image", 2]]), **{name: cache})
        assert streams_of(cache).rows[0].spans == ((4, 20),)
        for token in (tokens(30) % 80).split(1, dim=1):
            model(token, **{name: cache})
    assert streams_of(cache).rows[0].spans == ()
