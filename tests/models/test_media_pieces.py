"""Long prompts with images that go in by pieces: positions of several coordinates, deepstack, whole turns behind."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch

from sink_patch import SinkCache, UnsupportedGenerationError
from sink_patch.models.entries import decoder_of
from sink_patch.streaming.bound import streams_of
from tests.models.test_media import ASKED as ASKED_FIRST
from tests.models.test_media import BIG, S, built, streaming, takes_images_later
from tests.models.test_media_coordinates import COORDINATES, part, places_of, seconds, video
from tests.support import media
from tests.support.media.naive import PlacedCache, Places
from tests.support.media.oracle import embedded, fresh, given_to_decoder, visible
from tests.support.oracle import relative_error
from tests.support.replay import cache_name, named_inputs
from tests.support.tiny import tokens

W = 30
SINK = {"cache_implementation": "sink", "window_length": W, "num_sink_tokens": S}
GRIDS = [name for name in COORDINATES if "image_grid_thw" in media.SAMPLES[name].inputs(1)]
ASKED = {**ASKED_FIRST, "suppress_tokens": list(range(88, 96))}  # an answer that says so would stand for an image
PROMPTS = {
    "in the first, a middle and the last piece": (["image", 30, "image", 5, "image", 25, "image"], 12),
    "two beside each other": ([5, "image", "image", 6, "image", 17], 7),
}


@contextlib.contextmanager
def watched(model):
    """Columns of each forward of the decoder, and how often positions were made and images encoded."""
    columns, made, encoded = [], [], []
    maker = next(one for one in model.modules() if hasattr(one, "get_rope_index"))
    encoder = next(one for name, one in model.named_modules() if name.split(".")[-1] in ("visual", "vision_tower"))
    decoder, make = decoder_of(model), maker.get_rope_index
    hooks = [
        decoder.register_forward_pre_hook(
            lambda _, args, given: columns.append(given["inputs_embeds"].shape[1]), with_kwargs=True
        ),
        encoder.register_forward_pre_hook(lambda *_: encoded.append(1)),
    ]
    with pytest.MonkeyPatch.context() as patch:
        counting = functools.wraps(make)(lambda *args, **given: made.append(1) or make(*args, **given))
        patch.setattr(maker, "get_rope_index", counting)
        yield columns, made, encoded
    for hook in hooks:
        hook.remove()


def cache_among(out) -> SinkCache:
    return next(value for value in out.values() if isinstance(value, SinkCache))


def generated(model, given, size, **more):
    """What `generate` returns, and the columns of its forwards; encoders run once, and positions are made once."""
    streaming(model)
    if not takes_images_later(model):
        pytest.skip("images of later turns are refused by name with this transformers")
    with watched(model) as (columns, made, encoded):
        out = model.generate(**given, **ASKED, **SINK, prefill_chunk_size=size, **more)
    assert (len(made), len(encoded)) == (1, 1)
    return out, columns


def row_alone(given, ids, row, images):
    """The arguments of one row without its padding, with so many images before it and in it; and its whole stream."""
    real = given["attention_mask"][row].bool()
    alone = {
        name: value[row : row + 1, real] for name, value in given.items() if value.shape == given["input_ids"].shape
    }
    before, count = images
    if count:
        alone["pixel_values"] = given["pixel_values"][32 * before : 32 * (before + count)]
        alone["image_grid_thw"] = given["image_grid_thw"][before : before + count]
    start = int((~real).sum())
    return alone, ids[row : row + 1, start:], start


def replayed(model, given, ids, columns, padding=0):
    """The last logits of each forward of one row in a naive cache: each is given its own images, as a turn of its own.

    Args:
        given, ids: of the row, see `row_alone`.
        columns: of each forward, with so much padding in front of the row.
    """
    name, found, start, prompt = cache_name(model), [], -padding, given["input_ids"].shape[1]
    whole = embedded(model, given, ids[:, prompt:])
    if whole["position_ids"] is None:  # text alone
        whole["position_ids"] = torch.arange(ids.shape[1]).expand(3, 1, -1)
    naive = PlacedCache(model, W, S, places_of(whole, ids))
    for new in columns:
        first, start = max(0, start), start + new
        if start <= first:
            found.append(None)
            continue
        piece = part(given, first, start) if first < prompt else {"input_ids": ids[:, first:start]}
        inputs = {**piece, **named_inputs(model, naive.start(start - first))}
        found.append(model(**inputs, use_cache=True, **{name: naive}).logits[:, -1])
        naive.finish()
    return found


@pytest.mark.parametrize("which", PROMPTS)
@pytest.mark.parametrize("model_type", GRIDS)
@torch.no_grad()
def test_pieces_equal_a_naive_cache_and_the_same_forwards_by_hand(model_type, which):
    model, (parts, size) = built(model_type), PROMPTS[which]
    given, start = media.prompt(model, [parts]), 0
    out, columns = generated(model, given, size)
    wanted = replayed(model, given, out.sequences, columns)
    for one, other in zip(out.logits, wanted[-len(out.logits) :], strict=True):
        assert relative_error(one, other) < 1e-5
    by_hand, prompt = SinkCache(W, S, model=model), given["input_ids"].shape[1]
    for new, logits in zip(columns, wanted, strict=True):
        piece = {"input_ids": out.sequences[:, start : start + new]}
        piece = part(given, start, start + new) if start < prompt else piece
        try:
            found = model(**piece, **{cache_name(model): by_hand}).logits[:, -1]
        except UnsupportedGenerationError as refusal:
            if "the token that begins it" not in str(refusal):  # which stands in the piece before
                raise
            return
        assert relative_error(found, logits) < 1e-5, start
        start += new
    assert streams_of(cache_among(out)).rows == streams_of(by_hand).rows


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl"])
@torch.no_grad()
def test_rows_of_a_padded_batch_equal_naive_caches_of_their_own(model_type):
    model = built(model_type)
    given = media.prompt(model, [["image", 20, "image", 11], [4, "image", 9], [13]])
    out, columns = generated(model, given, 12)
    for row, images in enumerate([(0, 2), (2, 1), (3, 0)]):
        alone, ids, padding = row_alone(given, out.sequences, row, images)
        wanted = replayed(model, alone, ids, columns, padding)
        for one, other in zip(out.logits, wanted[-len(out.logits) :], strict=True):
            assert relative_error(one[row : row + 1], other) < 1e-5


@pytest.mark.parametrize("sinks", [3, 14])
@torch.no_grad()
def test_a_prompt_longer_than_the_context_goes_in_by_pieces_of_its_own_accord(sinks):
    """One layer, whose clock is set back: the last logits are those of the sinks and of the last piece."""
    model = media.build("qwen2_vl", ("full_attention",), max_position_embeddings=40)
    streaming(model)
    given = media.prompt(model, [[2, "image", 9, "image", 3, "image", 22, "image", 1]])
    with watched(model) as (columns, _, _):
        sizes = {**SINK, "window_length": sinks + 14, "num_sink_tokens": sinks}
        out = model.generate(**given, **{**ASKED, "max_new_tokens": 1}, **sizes)
    last, prompt = columns[-1], given["input_ids"].shape[1]
    assert columns == [14, 8, 13, 14, 14, 14]
    whole = embedded(model, given, tokens(1)[:, :0])
    places, kept = places_of(whole, given["input_ids"]), visible(prompt - last, last, sinks + 14, sinks)
    wanted = fresh(model, whole["inputs_embeds"][:, kept], position_ids=places.of(kept, sinks)[:, None])
    assert relative_error(out.logits[0], wanted) < 1e-5
    assert streams_of(cache_among(out)).rows[0].base


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl"])
@torch.no_grad()
def test_a_piece_ends_with_a_video_that_goes_further_than_the_text_behind_it(model_type):
    model = built(model_type)
    given = video(model, **(seconds(1) if model_type == "qwen2_5_vl" else {}))
    streaming(model)
    more = tokens(6) % 80
    given["input_ids"] = torch.cat((given["input_ids"], more), dim=1)
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    if "mm_token_type_ids" in given:
        given["mm_token_type_ids"] = 2 * (given["input_ids"] == 91).long()
    given["input_ids"][0, 11] = 7  # no token stands between the video and the text
    with watched(model) as (columns, _, _):
        out = model.generate(**given, **ASKED, **{**SINK, "window_length": 10}, prefill_chunk_size=8)
    assert columns[:2] == [3, 8]
    whole = embedded(model, given, out.sequences[:, given["input_ids"].shape[1] :])
    coordinates, prompt = whole["position_ids"][-3:, 0], given["input_ids"].shape[1]
    behind = coordinates[:, prompt - 1 : prompt]
    coordinates[:, prompt:] = behind + 1 + torch.arange(coordinates.shape[1] - prompt)
    naive = PlacedCache(model, 10, S, Places(coordinates, (out.sequences[0] == 91).tolist()))
    found, start = [], 0
    for new in columns:
        inputs = {**named_inputs(model, naive.start(new)), "use_cache": True, cache_name(model): naive}
        with given_to_decoder(model, inputs_embeds=whole["inputs_embeds"][:, start : start + new]):
            found.append(model(torch.full((1, new), 2), **inputs).logits[:, -1])
        naive.finish()
        start += new
    for one, other in zip(out.logits, found[-len(out.logits) :], strict=True):
        assert relative_error(one, other) < 1e-5


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen3_vl"])
@torch.no_grad()
def test_a_later_turn_by_pieces_equals_a_naive_cache(model_type):
    """Given as a whole history, over a window that is full; its image is not in its first piece."""
    model = built(model_type)
    streaming(model)
    if not takes_images_later(model):
        pytest.skip("images of later turns are refused by name with this transformers")
    given, first = media.prompt(model, [[4, "image", 20, 16, "image", 9, "image", 3]]), 34
    name, prompt = cache_name(model), given["input_ids"].shape[1]
    cache = SinkCache(W, S, model=model)
    model(**part(given, 0, first), **{name: cache})
    with watched(model) as (columns, made, encoded):
        out = model.generate(**given, **ASKED, prefill_chunk_size=12, **{name: cache})
    assert (len(made), len(encoded)) == (1, 1)
    assert columns[: -len(out.logits) + 1] == [12, 5, 12, 7, 12]
    wanted = replayed(model, given, out.sequences, [first, *columns])
    for one, other in zip(out.logits, wanted[-len(out.logits) :], strict=True):
        assert relative_error(one, other) < 1e-5
    (row,) = streams_of(cache).rows
    assert (len(row.images), row.lag, row.seen) == (3, 12, prompt + len(out.logits) - 1)


@pytest.mark.parametrize("model_type", ["granite_docling", "granite4_vision", "cohere_compass", "qwen3_vl_moe"])
def test_what_the_decoder_is_given_of_the_layers_of_an_encoder_is_cut_by_images(model_type):
    """Deepstack: below the window the text is that of the default cache, and what is cut matters."""
    model, sink = built(model_type), {**BIG, "window_length": 150}
    streaming(model)
    given = media.prompt(model, [[3, "image", 9, "image", 8]])
    wanted, found = (model.generate(**given, **ASKED, **more) for more in ({}, {**sink, "prefill_chunk_size": 7}))
    for one, other in zip(found.logits, wanted.logits, strict=True):
        assert relative_error(one, other) < 1e-5


def test_what_a_decoder_is_given_that_cannot_be_cut_is_refused_by_name():
    model = media.build("llava")
    given = media.prompt(model, [[2, "image", 3, "image", 2]])
    streaming(model)
    if not hasattr(decoder_of(model), "layers"):
        pytest.skip("its decoder is not called by itself")

    def more(_module, args, kwargs):
        return args, {**kwargs, "features": [torch.ones(5, 64)]}

    decoder_of(model).register_forward_pre_hook(more, with_kwargs=True, prepend=True)
    with pytest.raises(UnsupportedGenerationError, match="gives its decoder features, which cannot be cut"):
        model.generate(**given, **ASKED, **BIG, prefill_chunk_size=7)


@torch.no_grad()
def test_an_image_is_refused_in_a_later_turn_whose_model_does_not_see_where_it_begins():
    """It would get the positions of text."""
    model = built("qwen2_5_omni_thinker")
    given, cache = media.prompt(model, [[2, "image", 3]]), streaming(model)
    model(**part(given, 0, 2), **{cache_name(model): cache})
    columns = given["input_ids"].shape[1]
    assert model(**part(given, 2, columns), **{cache_name(model): cache.clone()}).logits.shape[1] == columns - 2
    model(**part(given, 2, 3), **{cache_name(model): cache})
    with pytest.raises(UnsupportedGenerationError, match="Give the token that begins it in the same turn"):
        model(**part(given, 3, columns), **{cache_name(model): cache})
    assert cache.get_seq_length() == 3
