"""Calls with images go on in kept streams: what is read anew is what is new, and what they say is right."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

import sink_patch
from sink_patch import SinkCache
from sink_patch.compat import installed_shim
from tests.kept.seeing import NEW, Talk, watched
from tests.models.test_media import built, skip_without_later_images, streaming, takes_images_later
from tests.models.test_media_talks import ANSWER, given
from tests.support import media
from tests.support.oracle import relative_error

pytestmark = pytest.mark.usefixtures("later_images")
MARGIN = 16
S = 3


@pytest.fixture(scope="module")
def later_images():
    skip_without_later_images()


def model_of(model_type):
    model = built(model_type)
    streaming(model)
    if not takes_images_later(model):
        pytest.skip("images of later turns are refused by name with this transformers")
    return model


def said(model, parts, seed):
    """Ids of a turn, [1, columns]."""
    return media.prompt(model, [parts], seed=seed)["input_ids"]


def picture(model, seed):
    return media.images(model, 1, seed=seed)


@pytest.mark.parametrize("window", [24, 400])
@pytest.mark.parametrize("model_type", ["llava", "qwen2_vl", "qwen3_vl", "idefics3", "qwen2_audio", "janus"])
def test_each_turn_reads_what_is_new_and_no_encoder_sees_an_old_image(model_type, window):
    model, rng = model_of(model_type), random.Random(window)
    with watched(model) as seen:
        talk = Talk(model, seen, {"window_length": window, "num_sink_tokens": S})
        ids, images, known = torch.zeros(1, 0).long(), [], 0
        for turn in range(5):
            new = [picture(model, rng.randrange(3)) for _ in range((turn != 1) * rng.randint(0, 2))]
            parts = [part for _ in new for part in ("image", rng.randint(1, 5))]
            ids = torch.cat((ids, said(model, [rng.randint(2, 20), *parts], seed=turn)), dim=1)
            images += new
            text, logits = talk.ask(ids, images)
            assert (talk.known, talk.images_seen()) == (known, len(new))
            assert relative_error(logits, talk.wanted()) < 1e-5
            ids, known = text, text.shape[1] - 1
    assert len(sink_patch.kept_streams) == 1


def begun(talk, turns, seed=0):
    """A talk of some turns, each of which brings an image: ids, and images."""
    model, ids, images = talk.model, torch.zeros(1, 0).long(), []
    for turn in range(turns):
        ids = torch.cat((ids, said(model, [5, "image", 4], seed=seed + turn)), dim=1)
        images.append(picture(model, seed + turn))
        ids, _ = talk.ask(ids, images)
    return ids, images


def plain(talk, ids, images):
    """The logits of the same call without kept streams."""
    sizes = {name: value for name, value in talk.asked.items() if name != "keep_streams"}
    _, logits = Talk(talk.model, talk.seen, {**sizes, "keep_streams": 0}).ask(ids, images)
    return logits


@pytest.mark.parametrize("window", [24, 400])
@pytest.mark.parametrize("model_type", ["llava", "qwen2_vl"])
def test_the_same_ids_with_other_images_are_another_text(model_type, window):
    """Another one goes on before it; another first one, another order are read anew."""
    model = model_of(model_type)
    with watched(model) as seen:
        talk = Talk(model, seen, {"window_length": window, "num_sink_tokens": S})
        ids, (one, two) = begun(talk, 2)
        first = sum(talk.calls[0][2]) if window == 24 else 0  # a copy of which is kept where it would be overwritten
        more, other = torch.cat((ids, said(model, [3], seed=9)), dim=1), picture(model, 7)
        for images, known in ([one, other], first), ([other, two], 0), ([two, one], 0), ([one, two], ids.shape[1] - 1):
            branch = Talk(model, seen, talk.asked, list(talk.calls))
            _, logits = branch.ask(more, images)
            assert branch.known == known
            assert relative_error(logits, branch.wanted()) < 1e-5
            if window == 400:
                assert relative_error(logits, plain(talk, more, images)) < 1e-5
        assert relative_error(plain(talk, more, [one, other]), plain(talk, more, [one, two])) > 1e-2


def test_ids_that_stand_for_images_and_bring_none_are_neither_kept_nor_gone_on_in():
    model = model_of("llava")
    with watched(model) as seen:
        talk = Talk(model, seen, {"window_length": 400, "num_sink_tokens": S})
        words, images = said(model, [5, "image", 4], seed=0), [picture(model, 0)]
        _, logits = talk.ask(words, [])
        assert len(sink_patch.kept_streams) == 0
        talk.ask(words, images)
        again, same = talk.ask(words, [])
        assert (talk.known, len(sink_patch.kept_streams)) == (0, 1)
        assert torch.equal(logits, same)
        with pytest.raises(ValueError, match="do not match"):  # says the model itself, as with any cache
            talk.ask(torch.cat((again, said(model, [3, "image"], seed=9)), dim=1), images)


@pytest.mark.parametrize("new", [16, 40])
def test_an_answer_that_says_an_image_is_none(new):
    """Of 16 ids that stand for one: another prompt of the same ids brings an image there."""
    model = model_of("llava")
    sink = {"cache_implementation": "sink", "window_length": 400, "num_sink_tokens": S, "keep_streams": 4}
    ids, images = said(model, [5, "image", 4], seed=0), picture(model, 0)
    asked = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0}
    text = model.generate(ids, **images, **sink, **asked, sequence_bias={(media.TOKEN,): 1e4})[:, : ids.shape[1] + 16]
    assert (text[:, -16:] == media.TOKEN).all()
    assert len(sink_patch.kept_streams) == 0, "ids that were not passed by name cannot be looked at in time"
    model.generate(input_ids=ids, **images, **sink, **asked, sequence_bias={(media.TOKEN,): 1e4})
    assert len(sink_patch.kept_streams) == 1
    more = {
        "input_ids": torch.cat((text, said(model, [3], seed=3)), dim=1),
        "pixel_values": torch.cat((images["pixel_values"], picture(model, 1)["pixel_values"])),
        "do_sample": False,
        "max_new_tokens": NEW,
        "pad_token_id": 0,
    }
    assert torch.equal(model.generate(**more, **sink), model.generate(**more))


@pytest.mark.parametrize(("model_type", "size"), [("llava", None), ("llava", 18), ("qwen2_vl", None)])
def test_an_answer_that_is_written_anew_is_read_again_and_no_image_is(model_type, size):
    """What the answer begins with is in no later prompt, nor is the end of the prompt before it."""
    model, opening = model_of(model_type), torch.tensor([[81, 82, 83]])
    pieces = {} if size is None else {"prefill_chunk_size": size}
    with watched(model) as seen:
        talk = Talk(model, seen, {"window_length": 24, "num_sink_tokens": S})
        history, images = torch.zeros(1, 0).long(), []
        for turn in range(6):
            new = [picture(model, turn)] if turn in (0, 1, 4) else []
            parts = [3, *(["image"] * len(new)), 9 + 3 * turn]
            question, images = said(model, parts, seed=turn), images + new
            prompt = torch.cat((history, question, opening), dim=1)
            text, logits = talk.ask(prompt, images, **pieces)
            assert talk.images_seen() == len(new)
            assert turn == 0 or talk.known >= history.shape[1] - (NEW - 1) - MARGIN
            assert relative_error(logits, talk.wanted()) < 1e-5
            history = torch.cat((history, question, text[:, prompt.shape[1] + 1 :]), dim=1)
    assert len(sink_patch.kept_streams) == 1


@pytest.mark.parametrize("model_type", ["gemma3", "paligemma", "minicpmv4_6"])
def test_what_cannot_go_on_is_read_anew(model_type):
    """New images that its model takes in a first prompt alone, a prompt that sees itself, images as they are told."""
    model = built(model_type)
    streaming(model)
    images = [picture(model, seed) for seed in range(2)]
    turns = [[5, "image", 4], [6], [3, "image", 2]][: 2 if model_type == "minicpmv4_6" else 3]
    with watched(model) as seen:
        talk, ids = Talk(model, seen, {"window_length": 400, "num_sink_tokens": S}), torch.zeros(1, 0).long()
        for turn, parts in enumerate(turns):
            ids = torch.cat((ids, said(model, parts, seed=turn)), dim=1)
            right = plain(talk, ids, images[: 1 + turn // 2])
            ids, logits = talk.ask(ids, images[: 1 + turn // 2])
            assert relative_error(logits, right) < 1e-5
    assert bool(len(sink_patch.kept_streams)) == (model_type == "gemma3")


def test_where_an_image_depends_on_how_many_there_are_all_are_read_with_a_new_one():
    """LLaVA-OneVision makes tiles of one that is alone: 36 columns, and of one among several 17."""
    model = model_of("llava_onevision")
    turns, images = [2, 0, 1], []
    text = torch.zeros(1, 0).long()
    for turn, count in enumerate(turns):
        images += [picture(model, 5 * turn + number) for number in range(count)]
        text = torch.cat((text, said(model, [3], seed=turn), torch.full((1, 17 * count), media.TOKEN)), dim=1)
        text = torch.cat((text, said(model, [2], seed=9 + turn)), dim=1)
        more = {name: torch.cat([image[name] for image in images]) for name in images[0]}
        more |= {"input_ids": text, "batch_num_images": torch.tensor([len(images)])}
        more |= {"do_sample": False, "max_new_tokens": NEW, "suppress_tokens": [media.TOKEN], "pad_token_id": 0}
        sink = {"cache_implementation": "sink", "window_length": 400, "num_sink_tokens": S, "keep_streams": 4}
        found, wanted = model.generate(**more, **sink), model.generate(**more)
        assert torch.equal(found, wanted)
        text = wanted


def test_new_images_are_read_anew_where_a_version_puts_them_into_first_prompts_alone(monkeypatch):
    """Idefics2 in old versions: a kept stream takes text alone."""
    model = model_of("llava")
    old = replace(installed_shim(), first_media="llava")
    monkeypatch.setattr("sink_patch.streaming.media.given.installed_shim", lambda: old)
    with watched(model) as seen:
        talk = Talk(model, seen, {"window_length": 400, "num_sink_tokens": S})
        ids, images = begun(talk, 1)
        for parts, brought in ([4], images), ([3, "image", 2], [*images, picture(model, 1)]):
            known = 0 if "image" in parts else ids.shape[1] - 1
            ids = torch.cat((ids, said(model, parts, seed=7)), dim=1)
            right = plain(talk, ids, brought)
            ids, logits = talk.ask(ids, brought)
            assert talk.known == known
            assert relative_error(logits, right) < 1e-5


@pytest.mark.parametrize("model_type", ["llava", "qwen2_vl"])
def test_padding_before_a_prompt_is_no_part_of_its_text(model_type):
    model, kinds = model_of(model_type), ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    images = [picture(model, seed) for seed in range(2)]
    sink = {"cache_implementation": "sink", "window_length": 24, "num_sink_tokens": S, "keep_streams": 4}
    with watched(model) as seen:
        talk = Talk(model, seen, {"window_length": 24, "num_sink_tokens": S})
        first, _ = talk.ask(said(model, [5, "image", 30], seed=0), images[:1])
        text = torch.cat((first, said(model, [3, "image", 4], seed=1)), dim=1)
        wanted, _ = talk.ask(text, images)
        for padding in (0, 1, 7):
            sink_patch.kept_streams.clear()
            for ids, some in (first[:, :-NEW], images[:1]), (text, images):
                inputs = given(model, ids, some, ids.shape[1])
                padded = {name: torch.nn.functional.pad(inputs[name], (padding, 0)) for name in kinds if name in inputs}
                seen.clear()
                out = model.generate(**{**inputs, **padded}, **ANSWER, **sink)
            assert torch.equal(out.sequences[:, padding:], wanted)
            assert (sum(seen.forwards), talk.images_seen()) == (text.shape[1] - first.shape[1] + 1 + NEW - 1, 1)


def test_instructions_with_an_image_stay_whole_and_what_is_returned_is_the_callers_own():
    """The sinks are as many as the system message has tokens, which is known before a stream is looked for."""
    model, image = model_of("llava"), picture(model_of("llava"), 0)
    sink = {"cache_implementation": "sink", "window_length": 60, "num_sink_tokens": "system", "keep_streams": 4}
    starts = {"system_start": [[85]], "turn_start": [[86]]}
    ids = torch.cat((torch.tensor([[85]]), said(model, ["image", 3], seed=1), torch.tensor([[86, 7, 8]])), dim=1)
    with watched(model) as seen:
        talk = Talk(model, seen, {**sink, **starts})
        for turn in range(3):
            out = model.generate(**given(model, ids, [image], ids.shape[1]), **ANSWER, **sink, **starts)
            cache = next(value for value in out.values() if isinstance(value, SinkCache))
            assert (cache.num_sink_tokens, talk.images_seen()) == (20, 1)
            cache.reset()  # and the kept one stays whole
            ids = torch.cat((out.sequences, torch.tensor([[86, 9, 10 + turn]])), dim=1)
    assert len(sink_patch.kept_streams) == 1
