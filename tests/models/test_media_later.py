"""Images in later turns: those that were read are left out, the others are columns like any others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from sink_patch import HistoryMismatchError, SinkCache, UnsupportedGenerationError
from sink_patch.models.entries import decoder_of
from sink_patch.models.families.media import MEDIA
from sink_patch.streaming.bound import streams_of
from sink_patch.streaming.media.images import images_among
from tests.models.test_media import ASKED as ASKED_FIRST
from tests.models.test_media import BIG, SMALL, S, built, skip_without_later_images, streaming, takes_images_later
from tests.support import media
from tests.support.known_gaps import is_newest
from tests.support.media.oracle import Sight, embedded, fresh
from tests.support.oracle import relative_error
from tests.support.replay import cache_name
from tests.support.tiny import tokens

pytestmark = pytest.mark.usefixtures("later_images")
ASKED = {**ASKED_FIRST, "suppress_tokens": [90]}  # an answer that says so would stand for an image
TYPES = ("token_type_ids", "mm_token_type_ids")


@pytest.fixture(scope="module")
def later_images():
    skip_without_later_images()


def turn(model, rows, seed=5):
    """A later turn: the last token of the answer before is no part of it."""
    return media.prompt(model, rows, seed)


def history(model, first, answers, second, padding=None):
    """All of a chat, as a processor makes it of its texts and images: the arguments of `generate`.

    Args:
        first, second: turns of one row each.
        answers: the first turn and what came after it, [1, columns].
    """
    ids = torch.cat((answers, second["input_ids"]), dim=1)
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name in first.keys() - whole.keys():
        if name in TYPES:
            whole[name] = (ids == 90).long()
        else:
            whole[name] = torch.cat((first[name], second[name]), int(MEDIA[model.config.model_type].by_rows))
    return whole


def begun(model, first, **sizes):
    """What a first turn has returned, and its cache."""
    try:
        out = model.generate(**first, **ASKED, **sizes)
    except UnsupportedGenerationError as refusal:
        if is_newest():
            raise
        pytest.skip(str(refusal))
    return out.sequences, next(value for value in out.values() if isinstance(value, SinkCache))


def assert_alike(found, wanted):
    assert torch.equal(found.sequences, wanted.sequences)
    for one, other in zip(found.logits, wanted.logits, strict=True):
        assert relative_error(one, other) < 1e-5


@pytest.mark.parametrize(
    "model_type",
    # one of each way to give images; janus prepares the config of a call twice, qwen3_omni has positions in floats
    [
        "llava",
        "granite_docling",
        "mistral3",
        "qwen2_vl",
        "glm4v",
        "janus",
        "qwen3_omni_moe_thinker",
        "gemma3",
        "gemma4",
    ],
)
def test_below_the_window_a_later_turn_equals_that_of_the_default_cache(model_type):
    """Given as a whole, as the new tokens alone, and with no new image; encoders see new images alone."""
    model, seen = built(model_type), []
    streaming(model)
    if not takes_images_later(model):
        pytest.skip("images of later turns are refused by name with this transformers")
    first, second = turn(model, [[2, "image", 3]]), turn(model, [[4, "image", 2]])
    answer, cache = begun(model, first, **{**BIG, "window_length": 150})
    whole, name = history(model, first, answer, second), cache_name(model)
    wanted = model.generate(**whole, **ASKED)
    hook = (
        model.model.vision_tower.register_forward_pre_hook(
            lambda module, args, given: seen.append(len(args[0] if args else given["pixel_values"])), with_kwargs=True
        )
        if model_type == "llava"
        else None
    )
    one = cache.clone()
    assert_alike(model.generate(**whole, **ASKED, **{name: one}), wanted)
    if hook is not None:
        hook.remove()
        assert seen == [1]
    unread = whole["input_ids"].shape[1] - cache.get_seq_length()
    new = {**second, **{key: whole[key][:, -unread:] for key in whole if key in ("input_ids", *TYPES)}}
    new["attention_mask"] = whole["attention_mask"]
    assert_alike_behind(model.generate(**new, **ASKED, **{name: cache}), wanted, unread)
    text = torch.cat((wanted.sequences, tokens(3) % 80), dim=1)
    more = {**whole, "input_ids": text, "attention_mask": torch.ones_like(text)}
    more |= {key: (text == 90).long() for key in TYPES if key in whole}
    wanted = model.generate(**more, **ASKED)
    for both in (one, cache):
        assert len(streams_of(both).rows[0].images) == 2
        assert_alike(model.generate(**more, **ASKED, **{name: both}), wanted)


def assert_alike_behind(found, wanted, columns):
    """The new tokens were given alone."""
    end = ASKED["max_new_tokens"]
    assert torch.equal(found.sequences[:, columns:], wanted.sequences[:, -end:])
    for one, other in zip(found.logits, wanted.logits, strict=True):
        assert relative_error(one, other) < 1e-5


@torch.no_grad()
def test_one_layer_equals_a_fresh_forward_over_the_kept_tokens():
    """Images come by rules 1, 3 and 4, and leave whole."""
    model = media.build("llava", ("full_attention",), max_position_embeddings=64)
    window, rest = 30, tokens(60) % 80
    cache, name, start = SinkCache(window, S, model=model), cache_name(model), 0
    first = media.prompt(model, [[2, "image", 3, 4, "image", 2, 12, "image", 1]])
    ids = torch.cat((first["input_ids"], rest), dim=1)
    whole, sight = embedded(model, first, rest)["inputs_embeds"], Sight((ids == 90)[0].tolist(), window, S)
    steps = [21, 1, 1, 20, *[1] * 12, 17, *[1] * 40]
    for new in steps:
        piece = ids[:, start : start + new]
        images = int((piece == 90).sum()) // 16
        place = int((ids[:, :start] == 90).sum()) // 16
        given = {"pixel_values": first["pixel_values"][place : place + images]} if images else {}
        found = model(piece, **given, **{name: cache}).logits[:, -1]
        kept = sight.visible(start, new)
        assert relative_error(found, fresh(model, whole[:, kept])) < 1e-5, (start, new)
        start += new
    (row,) = streams_of(cache).rows
    assert (row.images_end, len(row.images), row.seen) == (72 - 1, 3, sum(steps))


def typed(like, ids):
    """Ids, with their types where the model has some."""
    return {"input_ids": ids, **{name: (ids == 90).long() for name in TYPES if name in like}}


def picked(given, images):
    """The tensors of some images; those of qwen2_vl have 32 patches each."""
    patches = len(given["pixel_values"]) // 32 if "image_grid_thw" in given else 0
    some = {name: given[name] for name in ("pixel_values", "image_grid_thw") if name in given}
    if patches:
        some["pixel_values"] = given["pixel_values"].unflatten(0, (patches, 32))
    some = {name: value[images] for name, value in some.items()}
    return {**some, "pixel_values": some["pixel_values"].flatten(0, 1)} if patches else some


def joined(one, other):
    return {name: torch.cat((one[name], other[name])) for name in one}


@pytest.mark.parametrize("model_type", ["llava", "qwen2_vl", "gemma3"])
def test_a_row_with_a_new_image_and_one_without_are_as_if_alone(model_type):
    """Whole histories and new tokens alone, over a window that is full; padding stands between the turns."""
    model = built(model_type)
    streaming(model)
    if not takes_images_later(model):
        pytest.skip("images of later turns are refused by name with this transformers")
    name, firsts = cache_name(model), media.prompt(model, [[3, "image", 2], ["image", 9]])
    seconds, alone = media.prompt(model, [[2, "image", 4], [3]], seed=5), []
    answers, cache = begun(model, firsts, **SMALL)
    for row in range(2):
        real, behind = firsts["attention_mask"][row].bool(), seconds["attention_mask"][row].bool()
        first = typed(firsts, firsts["input_ids"][row : row + 1, real]) | picked(firsts, [row])
        answer, own = begun(model, first, **SMALL)
        assert torch.equal(answer[0, -6:], answers[row, -6:])
        with torch.no_grad():
            model(answer[:, -1:], **{name: own})  # as where padding stands behind it
        text = torch.cat((answer, seconds["input_ids"][row : row + 1, behind]), dim=1)
        more = typed(firsts, text) | joined(picked(firsts, [row]), picked(seconds, [0][row:]))
        alone.append(model.generate(**more, **ASKED, **{name: own}).logits)
    ones = torch.ones_like(answers[:, firsts["input_ids"].shape[1] :])
    mask = torch.cat((firsts["attention_mask"], ones, seconds["attention_mask"]), dim=1)
    ids = torch.cat((answers, seconds["input_ids"]), dim=1)
    images = joined(joined(picked(firsts, [0]), picked(seconds, [0])), picked(firsts, [1]))
    whole, new = typed(firsts, ids) | images, ids[:, -seconds["input_ids"].shape[1] - 1 :]
    for given in (whole, typed(firsts, new) | picked(seconds, [0])):
        one = cache.clone()
        logits = model.generate(**given, attention_mask=mask, **ASKED, **{name: one}).logits
        for step, found in enumerate(logits):
            for row in range(2):
                assert relative_error(found[row : row + 1], alone[row][step]) < 1e-5, (row, step)
        assert [len(row.images) for row in streams_of(one).rows] == [2, 1]
    one.batch_select_indices(torch.tensor([1, 0]))
    assert [len(row.images) for row in streams_of(one).rows] == [1, 2]


def test_a_cache_that_was_saved_knows_its_images(tmp_path):
    """Text behind images is taken back, and other images come; a file of before does not know which they were."""
    model = built("llava")
    streaming(model)
    first, second = media.prompt(model, [[2, "image", 3]]), turn(model, [[4, "image", 2]])
    answer, cache = begun(model, first, **BIG)
    cache.save(tmp_path / "cache.safetensors")
    again, name = SinkCache.load(tmp_path / "cache.safetensors", model=model), cache_name(model)
    assert streams_of(again).rows == streams_of(cache).rows
    whole = history(model, first, answer[:, :-3], second)
    wanted = model.generate(**whole, **ASKED)
    for one in (again, cache.clone()):
        assert streams_of(one).crop(2)
        assert_alike(model.generate(**whole, **ASKED, **{name: one}), wanted)
    assert not streams_of(one).crop(12)  # back into the second image
    (row,) = streams_of(cache).rows
    streams_of(cache).rows = [replace(row, images=())]
    with pytest.raises(UnsupportedGenerationError, match="cannot be said which of them"):
        model.generate(**history(model, first, answer, second), **ASKED, **{name: cache})


def test_what_cannot_be_right_is_refused_before_anything_is_computed():
    model = built("llava")
    streaming(model)
    first, second = media.prompt(model, [[2, "image", 3]]), turn(model, [[4, "image", 2]])
    answer, cache = begun(model, first, **BIG)
    whole, name = history(model, first, answer, second), cache_name(model)
    text = torch.cat((answer, tokens(4) % 80), dim=1)
    cases = [
        ({**whole, "pixel_values": whole["pixel_values"].flip(0)}, "are not those, number for number"),
        ({**whole, "pixel_values": second["pixel_values"]}, "are not those, number for number"),
        ({**whole, "pixel_values": first["pixel_values"]}, "some stand for images, while none of the images are new"),
        ({**whole, "input_ids": text, "attention_mask": None}, "none stands for images, while some"),
        ({**whole, "pixel_values": whole["pixel_values"][:0]}, "are not those"),
        ({**whole, "sizes_of_tiles": torch.ones(2, 2, dtype=torch.long)}, "sizes_of_tiles was given with all images"),
        ({**whole, "prompt_lookup_num_tokens": 2}, "pixel_values was given with drafts"),
        ({**whole, "input_ids": None, "inputs": whole["input_ids"]}, "not passed by name"),
    ]
    handle = register_module_forward_pre_hook(lambda module, _: pytest.fail(f"{type(module).__name__} ran"))
    try:
        for case, says in cases:
            given = {key: value for key, value in case.items() if value is not None}
            with pytest.raises((UnsupportedGenerationError, HistoryMismatchError), match=says):
                model.generate(**given, **ASKED, **{name: cache})
    finally:
        handle.remove()
    assert cache.get_seq_length() == answer.shape[1] - 1
    assert_alike(model.generate(**whole, **ASKED, **{name: cache}), model.generate(**whole, **ASKED))


def test_a_later_turn_that_goes_in_by_pieces_cuts_no_image():
    model, pieces = built("llava"), []
    streaming(model)
    if not hasattr(decoder_of(model), "layers"):
        pytest.skip("its decoder is not called by itself")
    first, second = media.prompt(model, [[2, "image", 3], ["image"]]), turn(model, [[12, "image", 9], [21, "image"]])
    answer, cache = begun(model, first, **BIG)
    ids = torch.cat((answer, second["input_ids"]), dim=1)
    images = [joined(picked(first, [row]), picked(second, [row])) for row in range(2)]
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    whole = {"input_ids": ids, "attention_mask": mask, **joined(*images)}
    hook = decoder_of(model).layers[0].register_forward_pre_hook(lambda _, args: pieces.append(args[0].shape[1]))
    found = model.generate(**whole, **ASKED, prefill_chunk_size=7, **{cache_name(model): cache})
    hook.remove()
    assert pieces[: -len(found.logits) + 1] == [7, 6, 25]
    assert_alike(found, model.generate(**whole, **ASKED))
    assert [len(row.images) for row in streams_of(cache).rows] == [2, 2]


@torch.no_grad()
def test_an_image_leaves_whole_with_its_message():
    """One layer, evict="turns"; the second image comes when the message of the first one must leave."""
    model = media.build("llava", ("full_attention",))
    window, name, start = 48, cache_name(model), 0
    cache = SinkCache(window, S, model=model, evict="turns", turn_start=[88])
    given = media.prompt(model, [[S, 1, 2, "image", 5, 1, 6, 1, 3, "image", 2, 24]])
    ids, begins = given["input_ids"], [3, 27, 34]
    ids[0, begins] = 88
    whole = embedded(model, given, tokens(1)[:, :0])["inputs_embeds"]
    for new in [24, 3, 7, 22, *[1] * 23]:
        images = int((ids[:, start : start + new] == 90).sum()) // 16
        pixels = {"pixel_values": given["pixel_values"][-images:] if start else given["pixel_values"][:1]}
        found = model(ids[:, start : start + new], **(pixels if images else {}), **{name: cache}).logits[:, -1]
        start += new
        floor = S if start <= window else next(place for place in begins if S + start - place <= window)
        kept = [*range(S), *range(floor, start)]
        assert relative_error(found, fresh(model, whole[:, kept])) < 1e-5, start
    (row,) = streams_of(cache).rows
    assert row.dropped == 31


def test_what_pads_an_image_beside_larger_ones_is_no_part_of_it():
    """In a later turn all images of a history may be padded to the size of a larger one."""
    small, large = torch.randn(1, 3, 4, 6), torch.randn(1, 3, 8, 8)
    padded = torch.nn.functional.pad(small, (0, 2, 0, 4))
    first = {"pixel_values": small, "image_sizes": torch.tensor([[4, 6]])}
    whole = {"pixel_values": torch.cat((padded, large)), "image_sizes": torch.tensor([[4, 6], [8, 8]])}
    wider = {**first, "image_sizes": torch.tensor([[4, 8]])}
    digests = [images_among(torch.nn.Module(), given)[0].digests for given in (first, whole, wider)]
    assert digests[1][0] == digests[0][0] != digests[2][0]
    assert digests[1][1] not in digests[0]
