"""Images that see themselves in both directions: in later turns, and in long prompts that go in by pieces."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from transformers import CONFIG_MAPPING

from sink_patch import CacheStateError, SinkCache, UnsupportedGenerationError
from sink_patch.compat.models import CACHE_NAMES, TYPES
from sink_patch.models.entries import decoder_of
from sink_patch.models.families.media import ALL, MEDIA, PROMPT
from sink_patch.streaming.bound import streams_of
from sink_patch.streaming.media.masks import Masks
from tests.models.test_media import ASKED as ASKED_FIRST
from tests.models.test_media import BIG, S, streaming, takes_images_later
from tests.support import media
from tests.support.known_gaps import is_newest
from tests.support.media.naive import written_masks
from tests.support.media.oracle import Sight, embedded, given_to_decoder
from tests.support.oracle import relative_error
from tests.support.replay import ReplayCache, cache_name, named_inputs
from tests.support.tiny import tokens
from tests.support.weights import seeded
from tests.support.zoo.configs import tiny_config

BOTH_WAYS = [name for name in media.SAMPLES if MEDIA[name].both_ways]
BY_PIECES = [name for name in BOTH_WAYS if MEDIA[name].both_ways != PROMPT]
ASKED = {**ASKED_FIRST, "suppress_tokens": list(range(88, 96))}  # an answer that says so would stand for an image
WINDOW = 6  # of sliding layers; an image has 4 columns


@functools.cache
def small(model_type, **more):
    """With several layers of each kind; skips where this transformers is refused by name."""
    stack = ("full_attention", "full_attention")
    if model_type not in ("molmo2", "paligemma"):
        stack, more = ("sliding_attention", "full_attention") * 2, {"sliding_window": WINDOW, **more}
    if model_type.startswith("gemma4"):
        more["num_kv_shared_layers"] = 0
    model = media.build(model_type, stack, **more)
    streaming(model)
    if not takes_images_later(model):
        assert not is_newest()
        pytest.skip("images of later turns are refused by name with this transformers")
    return model


def turn(model, parts, seed=0):
    """A turn, with the types that the processor writes: in PaliGemma all is the prompt."""
    given = media.prompt(model, [parts], seed)
    if MEDIA[model.config.model_type].both_ways == PROMPT:
        given["token_type_ids"] = torch.zeros_like(given["input_ids"])
    return given


def blocks_of(model, ids):
    """Of each column of a turn, [1, columns], which of those that see each other it belongs to."""
    how, of_image = MEDIA[model.config.model_type].both_ways, [*(ids[0] == media.TOKEN).tolist()]
    if how == PROMPT:
        return [0] * len(of_image)
    starts = [int(one and not before) for one, before in zip(of_image, [False, *of_image], strict=False)]
    return [(0 if how == ALL else sum(starts[: place + 1])) if one else None for place, one in enumerate(of_image)]


def naively(model, naive, ids, embeddings, blocks, *, beyond=False):
    """The last logits of a forward over a naive cache, with masks that are written."""
    new, name = ids.shape[1], cache_name(model)
    inputs = {**named_inputs(model, naive.start(new)), "use_cache": True, name: naive}
    by_kind = (
        {"full_attention": [None] * new} if model.config.model_type == "gemma4" else {}
    )  # of others they are alike
    masks = written_masks(naive, new, blocks, beyond=beyond, **by_kind)
    masks = masks if len(masks) > 1 else next(iter(masks.values()))
    with torch.no_grad(), given_to_decoder(model, inputs_embeds=embeddings, attention_mask=masks):
        found = model(ids, **inputs).logits[:, -1]
    naive.finish()
    return found


def naive_of(model, ids, window, local=0):
    """A naive cache for a text, ids [columns]."""
    return ReplayCache(model, window, S, Sight((ids == media.TOKEN).tolist(), window, S, local))


def embeddings_of(model, given):
    return embedded(model, given, tokens(1)[:, :0])["inputs_embeds"]


def with_sliding_windows():
    """PaliGemma 2: the decoder is that of Gemma 2."""
    config = copy.deepcopy(small("paligemma").config)
    stack = ("sliding_attention", "full_attention") * 2
    config.text_config = tiny_config(CONFIG_MAPPING["gemma2"], stack, sliding_window=WINDOW)
    return seeded(type(small("paligemma")), config, "eager", 0)


@pytest.mark.parametrize("window", [9, 40])
@pytest.mark.parametrize("model_type", [*BOTH_WAYS, "paligemma2"])
@torch.no_grad()
def test_later_images_equal_a_naive_cache_with_written_masks(model_type, window):
    """By rules 1, 3 and 4, alone, between text, and two at once; text follows each."""
    model = with_sliding_windows() if model_type == "paligemma2" else small(model_type)
    beyond = model_type == "paligemma2"
    turns = [[2, "image", 3], [1], [1, "image", 1], [1], ["image"], *[[1]] * 7, [1, "image", 2, "image", 1], [1], [3]]
    given_turns = [turn(model, parts, seed=number) for number, parts in enumerate(turns)]
    whole = torch.cat([given["input_ids"] for given in given_turns], dim=1)
    cache, naive = SinkCache(window, S, model=model), naive_of(model, whole[0], window)
    for number, (parts, given) in enumerate(zip(turns, given_turns, strict=True)):
        ids = given["input_ids"]
        has_images = "image" in parts
        blocks = blocks_of(model, ids) if has_images else [None] * ids.shape[1]
        wanted = naively(model, naive, ids, embeddings_of(model, given), blocks, beyond=beyond)
        named = {name: value for name, value in given.items() if has_images or name == "input_ids"}
        named.pop("attention_mask", None)
        found = model(**named, **{cache_name(model): cache}).logits[:, -1]
        assert relative_error(found, wanted) < 1e-5, number
    (row,) = streams_of(cache).rows
    assert len(row.images) == 5


@pytest.mark.parametrize("model_type", ["gemma3", "gemma4", "gemma4_unified"])
@torch.no_grad()
def test_an_image_longer_than_the_sliding_windows_is_masked_as_in_a_first_prompt(model_type):
    """In `gemma4_unified` it sees itself beyond them; the others did so too in older versions."""
    if model_type != "gemma4_unified" and not is_newest():
        pytest.skip("how it was masked differs from version to version")
    model = small(model_type, sliding_window=3)
    cache, naive = SinkCache(9, S, model=model), ReplayCache(model, 9, S)
    for seed in range(3):
        given = turn(model, [1, "image", 2], seed)
        blocks, beyond = blocks_of(model, given["input_ids"]), model_type == "gemma4_unified"
        wanted = naively(model, naive, given["input_ids"], embeddings_of(model, given), blocks, beyond=beyond)
        found = model(**{**given, "attention_mask": None}, **{cache_name(model): cache}).logits[:, -1]
        assert relative_error(found, wanted) < 1e-5, seed


def of_turns(model, *turns):
    """The arguments of several turns of one row, as one history."""
    by_columns = ("input_ids", "attention_mask", *TYPES)
    return {name: torch.cat([one[name] for one in turns], dim=int(name in by_columns)) for name in turns[0]}


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", BOTH_WAYS)
@torch.no_grad()
def test_below_the_window_a_later_turn_equals_that_of_the_default_cache(model_type, attn_implementation):
    """Given the same turns: the new tokens and images with types of all columns, and `generate` with ours."""
    model = small(model_type, attn_implementation=attn_implementation)
    first, second, name = turn(model, [2, "image", 3]), turn(model, [4, "image", 2], seed=5), cache_name(model)
    out = model.generate(**first, **ASKED, **{**BIG, "window_length": 150})
    cache = next(value for value in out.values() if isinstance(value, SinkCache))
    default = next(value for key, value in model.generate(**first, **ASKED).items() if key in CACHE_NAMES)
    answer = {"input_ids": out.sequences[:, first["input_ids"].shape[1] :]}
    none = int(MEDIA[model_type].both_ways == PROMPT)
    answer |= {key: torch.full_like(answer["input_ids"], none) for key in TYPES if key in first}
    whole = {key: torch.cat((first[key], answer[key], second[key]), dim=1) for key in answer}
    read = cache.get_seq_length()
    mask = torch.ones_like(whole["input_ids"])
    new = {**second, "input_ids": whole["input_ids"][:, read:], "attention_mask": mask}
    types = {key: whole[key] for key in TYPES if key in whole}
    wanted = model(**{**new, **types}, **{name: default}).logits[:, -1]
    mine = {**new, **{key: one[:, read:] for key, one in types.items()}}
    for given in ({**new, **types}, mine, {**mine, "attention_mask": None}):
        found = model(**given, **{name: cache.clone()}).logits[:, -1]
        assert relative_error(found, wanted) < 1e-5
    found = model.generate(**mine, **ASKED, **{name: cache}).logits[0]
    assert relative_error(found, wanted) < 1e-5


def pieces_of(model, given, window, size, asked):
    """What `generate` returns of a prompt that goes in by pieces, and columns of its forwards; encoders run once."""
    columns, encoded = [], []
    decoder, encoder = decoder_of(model), getattr(model.model, "vision_tower", None)
    hooks = [
        decoder.register_forward_pre_hook(
            lambda _, args, kwargs: columns.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
        )
    ]
    if encoder is not None:
        hooks.append(encoder.register_forward_pre_hook(lambda *_: encoded.append(1)))
    sink = {"cache_implementation": "sink", "window_length": window, "num_sink_tokens": S}
    out = model.generate(**given, **asked, **sink, prefill_chunk_size=size)
    for hook in hooks:
        hook.remove()
    assert len(encoded) == (encoder is not None)
    return out, columns


@pytest.mark.parametrize("window", [12, 60])
@pytest.mark.parametrize("model_type", BY_PIECES)
@torch.no_grad()
def test_pieces_of_a_prompt_equal_a_naive_cache_with_written_masks(model_type, window):
    """No piece cuts what sees itself; in Molmo2 that is all from the first image to the last."""
    model, start, found = small(model_type), 0, []
    given = turn(model, [3, "image", 9, "image", 2, "image", 6])
    out, columns = pieces_of(model, given, window, 5, ASKED)
    answers = out.sequences[:, given["input_ids"].shape[1] :]
    assert columns[: -len(out.logits) + 1] == ([3, 23, 5, 1] if model_type == "molmo2" else [3, 5, 5, 3, 5, 5, 5, 1])
    embeddings = embedded(model, given, answers)["inputs_embeds"]
    naive = naive_of(model, out.sequences[0], window)
    for new in columns:
        ids, some = out.sequences[:, start : start + new], embeddings[:, start : start + new]
        found.append(naively(model, naive, ids, some, blocks_of(model, ids)))
        start += new
    for one, other in zip(out.logits, found[-len(out.logits) :], strict=True):
        assert relative_error(one, other) < 1e-5


@pytest.mark.parametrize("model_type", ["gemma3", "gemma4_unified"])
@torch.no_grad()
def test_rows_of_a_padded_batch_that_go_in_by_pieces_equal_naive_caches_of_their_own(model_type):
    model = small(model_type)
    given = media.prompt(model, [[3, "image", 9, "image", 6], [4, "image", 2], [12]])
    out, columns = pieces_of(model, given, 11, 5, ASKED)
    whole = embedded(model, given, out.sequences[:, given["input_ids"].shape[1] :])["inputs_embeds"]
    for row in range(3):
        padding = int((given["attention_mask"][row] == 0).sum())
        naive, found, start = naive_of(model, out.sequences[row, padding:], 11, local=WINDOW - 1), [], 0
        for new in columns:
            first, start = max(padding, start), start + new
            if first < start:
                ids = out.sequences[row : row + 1, first:start]
                found.append(naively(model, naive, ids, whole[row : row + 1, first:start], blocks_of(model, ids)))
        for one, other in zip(out.logits, found[-len(out.logits) :], strict=True):
            assert relative_error(one[row : row + 1], other) < 1e-5


@pytest.mark.parametrize("model_type", ["gemma3", "gemma4"])
def test_a_later_turn_that_goes_in_by_pieces_is_that_of_the_default_cache(model_type):
    model = small(model_type)
    first, second = turn(model, [2, "image", 3]), turn(model, [9, "image", "image", 7], seed=5)
    out = model.generate(**first, **{**ASKED, "max_new_tokens": 1}, **{**BIG, "window_length": 150})
    cache = next(value for value in out.values() if isinstance(value, SinkCache))
    given, columns = of_turns(model, first, second), []
    hook = decoder_of(model).register_forward_pre_hook(
        lambda _, args, kwargs: columns.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    found = model.generate(**given, **ASKED, prefill_chunk_size=5, **{cache_name(model): cache})
    hook.remove()
    assert columns[: -len(found.logits) + 1] == [5, 4, 8, 5, 2]
    wanted = model.generate(**given, **ASKED)
    for one, other in zip(found.logits, wanted.logits, strict=True):
        assert relative_error(one, other) < 1e-5
    assert len(streams_of(cache).rows[0].images) == 3


def test_a_prompt_that_sees_itself_is_not_cut():
    model = small("paligemma")
    with pytest.raises(UnsupportedGenerationError, match="whole prompt sees itself in both directions, and its text"):
        model.generate(**turn(model, [3, "image", 9]), **ASKED, **BIG, prefill_chunk_size=5)


@torch.no_grad()
def test_where_masks_cannot_be_those_of_a_first_prompt_images_are_refused(monkeypatch):
    """Where the model has no maker, and where it makes others behind a first prompt; the cache goes on."""
    model = small("gemma3")
    given, cache = turn(model, [2, "image", 3]), SinkCache(50, S, model=model)
    named = {**given, cache_name(model): cache, "attention_mask": None}
    model(**named)
    make = type(model).create_masks_for_generate

    def forgetful(config, token_type_ids=None, **others):
        is_first = all(others.get(name) is None for name in CACHE_NAMES)
        return make(config, token_type_ids=token_type_ids if is_first else None, **others)

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "create_masks_for_generate", staticmethod(functools.wraps(make)(forgetful)))
        with pytest.raises(UnsupportedGenerationError, match="makes other masks for them there"):
            model(**named)
    with monkeypatch.context() as patch:
        patch.delattr(type(model), "create_masks_for_generate")
        with pytest.raises(UnsupportedGenerationError, match="has read 9 columns, and in this.*first prompt alone"):
            model(**named)
        with pytest.raises(UnsupportedGenerationError, match="makes the masks.*for whole prompts alone"):
            model.generate(**given, **ASKED, **BIG, prefill_chunk_size=5)
    assert cache.get_seq_length() == 9
    model(**named)
    assert cache.get_seq_length() == 18


@pytest.mark.parametrize("window", [9, 50])
@torch.no_grad()
def test_masks_that_nobody_could_give_are_no_guess(window, monkeypatch):
    """In a graph the hook before the decoder does not run: here it is as if it gave none."""
    model = small("gemma3")
    given, cache = turn(model, [2, "image", 3]), SinkCache(window, S, model=model)
    named = {**given, cache_name(model): cache, "attention_mask": None}
    model(**named)
    with monkeypatch.context() as patch:
        patch.setattr(Masks, "made", lambda *_: {})
        with pytest.raises(UnsupportedGenerationError, match="went through a compiled forward behind others"):
            model(**named)
    assert cache.get_seq_length() == 9
    if window == 9:  # then tokens were overwritten
        with pytest.raises(CacheStateError, match="after it had overwritten old tokens"):
            model(**named)
