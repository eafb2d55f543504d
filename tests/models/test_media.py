"""Models with images: one layer against fresh forwards, several against a naive cache, and what is refused."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from sink_patch import SinkCache, UnsupportedGenerationError, UnsupportedModelError, coverage, kept_streams, stream
from sink_patch.models.entries import decoder_of
from sink_patch.models.families.media import MEDIA, media_tokens
from sink_patch.streaming.bound import streams_of
from sink_patch.streaming.media.given import check_media
from tests.support import media
from tests.support.known_gaps import is_newest
from tests.support.media.oracle import Sight, embedded, fresh
from tests.support.oracle import relative_error
from tests.support.replay import ReplayCache, cache_name, named_inputs
from tests.support.tiny import tokens
from tests.support.zoo.configs import kinds_of, smallest_stack

W, S = 8, 3
ROWS = [[2, "image", 3, "image", 2]]
BIG = {"cache_implementation": "sink", "window_length": 200, "num_sink_tokens": S}
SMALL = {**BIG, "window_length": W}
ASKED = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}

PLAIN = [name for name in media.SAMPLES if not MEDIA[name].coordinates]

built = functools.cache(media.build)


def streaming(model: PreTrainedModel, window_length: int = W, num_sink_tokens: int = S) -> SinkCache:
    """A cache of it; skips where an old transformers is refused by name."""
    try:
        check_media(model, media.prompt(model, ROWS), 0)
        return SinkCache(window_length, num_sink_tokens, model=model)
    except (UnsupportedModelError, UnsupportedGenerationError) as refusal:
        if is_newest():
            raise
        pytest.skip(str(refusal))


def takes_images_later(model: PreTrainedModel) -> bool:
    """Whether it takes images in later turns, which old versions of some models do not, and are refused by name."""
    cache, name = SinkCache(W, S, model=model), cache_name(model)
    try:
        for seed in range(2):
            given = media.prompt(model, [[2, "image", 3]], seed=seed)
            model(**{**given, "attention_mask": None}, **{name: cache})
    except UnsupportedGenerationError:
        return False
    return True


def skip_without_later_images() -> None:
    """Where the transformers is too old even for LLaVA."""
    if not takes_images_later(built("llava")):
        assert not is_newest()
        pytest.skip("images of later turns are refused by name with this transformers")


def schedule(cache: SinkCache, singles: int = 2) -> list[int]:
    """So many single tokens, then several at once by rules 3 and 4, where the model takes that."""
    single = streams_of(cache).facts.one_by_one
    return [1] * (singles + 3) if single else [*[1] * singles, 3, 6, 1]


def text_config_class(model: PreTrainedModel) -> type:
    return type(model.config.get_text_config(decoder=True))


@pytest.mark.parametrize("model_type", ["llava", "gemma3"])
@torch.no_grad()
def test_one_layer_equals_a_fresh_forward_over_the_kept_tokens(model_type):
    for layer in kinds_of(text_config_class(built(model_type))):
        model = media.build(model_type, smallest_stack(text_config_class(built(model_type)), layer))
        cache, given = streaming(model), media.prompt(model, ROWS)
        steps, seen, start = schedule(cache, 6), given["input_ids"].shape[1], 0
        assert len(cache) == 1
        kind, text = cache.layers[0].kind, tokens(sum(steps)) % 80
        whole = embedded(model, given, text)["inputs_embeds"]
        sight = Sight((torch.cat((given["input_ids"], text), dim=1) == 90)[0].tolist(), W, S)
        found = model(**given, **{cache_name(model): cache}).logits[:, -1]
        assert relative_error(found, model(**given, use_cache=False).logits[:, -1]) < 1e-5
        for new in steps:
            found = model(text[:, start : start + new], **{cache_name(model): cache}).logits[:, -1]
            kept = sight.visible(seen, new)
            if kind.local:
                kept = list(range(max(0, seen + new - kind.capacity), seen + new))
            assert relative_error(found, fresh(model, whole[:, kept])) < 1e-5, (layer, start, new)
            seen, start = seen + new, start + new


@pytest.mark.parametrize("model_type", PLAIN)
@torch.no_grad()
def test_several_layers_equal_a_naive_cache(model_type):
    model = built(model_type)
    assert 90 in media_tokens(model.config)
    cache, name = streaming(model), cache_name(model)
    given, steps = media.prompt(model, ROWS), schedule(cache)
    is_simple = not MEDIA[model_type].both_ways and streams_of(cache).facts.one_by_one is None
    assert takes_images_later(model) or not is_simple or not is_newest()
    refused = not is_simple or not takes_images_later(model)
    text = tokens(sum(steps)) % 80
    pieces = [{"input_ids": piece} for piece in text.split(steps, dim=1)]
    pieces += [media.prompt(model, [new], seed=7) for new in ([1, "image", 1], ["image"], [1]) if not refused]
    whole = torch.cat([inputs["input_ids"] for inputs in (given, *pieces)], dim=1)
    naive = ReplayCache(model, W, S, Sight((whole == 90)[0].tolist(), W, S))
    first = named_inputs(model, naive.start(given["input_ids"].shape[1]))
    wanted = model(**{**given, **first}, use_cache=True, **{name: naive}).logits[:, -1]
    assert relative_error(model(**given, **{name: cache}).logits[:, -1], wanted) < 1e-5
    naive.finish()
    for number, piece in enumerate(pieces):
        piece.pop("attention_mask", None)
        inputs = {**piece, **named_inputs(model, naive.start(piece["input_ids"].shape[1]))}
        wanted = model(**inputs, use_cache=True, **{name: naive}).logits[:, -1]
        naive.finish()
        assert relative_error(model(**piece, **{name: cache}).logits[:, -1], wanted) < 1e-5, number


@pytest.mark.parametrize("model_type", ["llava", "gemma3"])
def test_below_the_window_the_text_is_that_of_the_default_cache_and_rows_are_as_if_alone(model_type):
    model = built(model_type)
    streaming(model)
    given = media.prompt(model, [[3, "image", 4, "image", 2], [1, "image", 4]])
    wanted, found = (model.generate(**given, **ASKED, **sink) for sink in ({}, BIG))
    assert torch.equal(found.sequences, wanted.sequences)
    real = given["attention_mask"][1].bool()
    alone = {name: value[1:][:, real] for name, value in given.items() if name != "pixel_values"}
    both = model.generate(**given, **ASKED, **SMALL)
    one = model.generate(**alone, pixel_values=given["pixel_values"][2:], **ASKED, **SMALL)
    for found, wanted in zip(both.logits, one.logits, strict=True):
        assert relative_error(found[1:], wanted) < 1e-5
    beams = {"max_new_tokens": 3, "do_sample": False, "num_beams": 2}
    assert torch.equal(model.generate(**given, **beams), model.generate(**given, **beams, **BIG))


def test_a_prompt_that_goes_in_by_pieces_cuts_no_image_and_runs_encoders_once(monkeypatch):
    model = built("llava")
    given, pieces, encoded = media.prompt(model, [[3, "image", 4, "image", 9], [1, "image", 4]]), [], []
    streaming(model)  # the probe runs here
    decoder = decoder_of(model)
    if not hasattr(decoder, "layers"):
        with pytest.raises(UnsupportedGenerationError, match="before its decoder is called"):
            model.generate(**given, **SMALL, prefill_chunk_size=7)
        return
    hooks = [
        decoder.layers[0].register_forward_pre_hook(lambda module, args: pieces.append(args[0].shape[1])),
        model.model.vision_tower.register_forward_pre_hook(lambda *_: encoded.append(1)),
    ]
    found = model.generate(**given, **ASKED, **BIG, prefill_chunk_size=7)
    ahead = pieces[: -ASKED["max_new_tokens"] + 1]
    for hook in hooks:
        hook.remove()
    # the second image begins in column 23, and that of the other row ends in column 43
    assert (ahead, len(encoded)) == ([3, 16, 4, 21, 4], 1)
    wanted = model.generate(**given, **ASKED)
    for one, other in zip(found.logits, wanted.logits, strict=True):
        assert relative_error(one, other) < 1e-5
    assert torch.equal(found.sequences, wanted.sequences)


def test_a_prompt_longer_than_the_context_goes_in_by_pieces():
    """One layer, whose last logits are those of the sinks and the last piece."""
    model = media.build("llava", ("full_attention",), max_position_embeddings=32)
    given, seen = media.prompt(model, ROWS), []
    if not hasattr(decoder_of(model), "layers"):
        return  # refused: see above
    hook = decoder_of(model).layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    found = model.generate(**given, **{**ASKED, "max_new_tokens": 1}, **SMALL).logits[0]
    hook.remove()
    assert seen[-5:] == [2, 16, 3, 16, 2]
    whole = embedded(model, given, tokens(1)[:, :0])["inputs_embeds"]
    assert relative_error(found, fresh(model, whole[:, [0, 1, 2, *range(34, 39)]])) < 1e-5


@pytest.mark.parametrize(
    ("model_type", "more", "says"),
    [
        ("llava", {"prompt_lookup_num_tokens": 2}, "pixel_values was given with drafts"),
        ("llava", {"inputs_embeds": torch.ones(1, 3, 64)}, "together with inputs_embeds"),
        ("llava", {"tone": torch.ones(1, 3)}, "was given tone with a SinkCache, which streams no such inputs"),
        ("paligemma", {"prefill_chunk_size": 7}, "sees itself in both|before its decoder is called"),
    ],
)
def test_what_cannot_be_right_is_refused_before_anything_is_computed(model_type, more, says):
    model = built(model_type)
    handle = register_module_forward_pre_hook(lambda module, _: pytest.fail(f"{type(module).__name__} ran"))
    try:
        with pytest.raises(UnsupportedGenerationError, match=says):
            model.generate(**media.prompt(model, ROWS), **more, **SMALL)
    finally:
        handle.remove()


def test_images_are_refused_where_the_config_does_not_name_their_ids(monkeypatch):
    model = built("minicpmv4_6")
    given = media.prompt(model, ROWS)
    monkeypatch.setattr(model.config, "image_token_id", None)
    with pytest.raises(UnsupportedGenerationError, match="was given pixel_values.*no such inputs"):
        model.generate(**given, **ASKED, **SMALL)


def test_text_follows_images_that_see_both_ways():
    model = built("gemma3")
    first = model.generate(**media.prompt(model, ROWS), **ASKED, **SMALL)
    cache = next(value for value in first.values() if isinstance(value, SinkCache))
    text = torch.cat((first.sequences, tokens(4) % 80), dim=1)
    assert model.generate(text, past_key_values=cache, max_new_tokens=3).shape[1] == text.shape[1] + 3
    assert cache.get_seq_length() == text.shape[1] + 2


@torch.no_grad()
def test_a_prompt_with_images_that_was_interrupted_may_be_given_again():
    model = built("llava")
    cache, given = streaming(model), media.prompt(model, ROWS)
    if not hasattr(decoder_of(model), "layers"):
        return

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = decoder_of(model).layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**given, **{cache_name(model): cache})
    hook.remove()
    wanted = model(**given, use_cache=False).logits[:, -1]
    assert relative_error(model(**given, **{cache_name(model): cache}).logits[:, -1], wanted) < 1e-5


@pytest.mark.parametrize(("model_type", "name"), [("gemma3", "token_type_ids"), ("gemma4", "mm_token_type_ids")])
def test_a_later_turn_sees_no_future_whatever_types_are_given(model_type, name):
    """Types of the whole history, as processors write them, are not by the columns of the cache."""
    model = built(model_type)
    streaming(model)
    given, text, found = media.prompt(model, [[3, "image", 5]]), tokens(8) % 80, []
    ids = torch.cat((given["input_ids"], text), dim=1)
    types = torch.cat((given[name], torch.zeros_like(text)), dim=1)
    for more in ({name: types}, {}):
        cache = SinkCache(9, S, model=model)
        with torch.no_grad():
            model(**given, **{cache_name(model): cache})
        out = model.generate(ids, past_key_values=cache, **{**ASKED, "max_new_tokens": 1}, **more)
        found.append(out.logits[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("by_pieces", [False, True])
def test_images_do_not_come_back_and_text_behind_them_does(by_pieces, tmp_path):
    """Fed again, the ids that stand for an image would be text. Files say it too; the second row has no image."""
    model = built("llava")
    streaming(model)
    if by_pieces and not hasattr(decoder_of(model), "layers"):
        return
    given = media.prompt(model, [[2, "image", 3, "image", 2], [4]])
    out = model.generate(**given, **ASKED, **BIG, **({"prefill_chunk_size": 7} if by_pieces else {}))
    cache = next(value for value in out.values() if isinstance(value, SinkCache))
    cache.save(tmp_path / "cache.safetensors")
    for one in (cache, SinkCache.load(tmp_path / "cache.safetensors", model=model)):
        first, second = streams_of(one).rows
        assert (first.seen, first.images_end, second.seen, second.images_end) == (44, 37, 9, 0)
        assert streams_of(one).take_back([8, 0]) == 0
        assert streams_of(one).take_back([7, 8]) is None


def test_each_that_is_called_exact_has_a_sample_that_proves_it():
    verdicts = {verdict.model_type: verdict for verdict in coverage().media}
    assert set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) <= set(verdicts)
    exact = [name for name, verdict in verdicts.items() if verdict.exact]
    assert {CONFIG_MAPPING[name].model_type for name in exact} <= set(media.SAMPLES)
    assert set(media.SAMPLES) == {name for name, one in MEDIA.items() if one.refusal is None}
    assert all(verdict.reason for verdict in verdicts.values())
    if is_newest():
        assert len(exact) >= 72


class _Words:
    """A tokenizer that writes ids as numbers."""

    def decode(self, ids, **_):
        return "".join(f"{int(one)} " for one in ids)


@pytest.mark.parametrize("model_type", ["gemma3", "qwen2_vl"])
def test_a_stream_begins_with_images(model_type):
    model = built(model_type)
    streaming(model)
    if model_type == "qwen2_vl" and not is_newest():
        pytest.skip("what makes the inputs of this model needs a mask, also without images")
    given, asked = media.prompt(model, ROWS), {"max_new_tokens": W, "do_sample": False}
    ids = given.pop("input_ids")
    wanted = model.generate(ids, **given, **asked, **SMALL)[0, ids.shape[1] :]
    del given["attention_mask"]
    sizes = {"window_length": W, "num_sink_tokens": S}
    assert "".join(stream(model, _Words(), ids, **given, **asked, **sizes)) == _Words().decode(wanted)


class _Processor(_Words):
    """Its chat template returns what it was made with, and text behind that."""

    def __init__(self, given):
        self.given = given

    def apply_chat_template(self, messages, **_):
        more = torch.tensor([[5 + len(message["content"]) for message in messages[1:]]], dtype=torch.long)
        ids = torch.cat((self.given["input_ids"], more), dim=1)
        return {**self.given, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_a_stream_of_a_chat_sees_its_images():
    """What comes behind them goes on in the same cache, and the template writes them again."""
    skip_without_later_images()
    model = built("llava")
    streaming(model)
    given, asked = media.prompt(model, ROWS), {"max_new_tokens": 6, "do_sample": False, "num_sink_tokens": S}
    chat = [{"role": "user", "content": [{"type": "image"}]}]
    asked["window_length"] = 200
    begun = stream(model, _Processor(given), chat, **asked)
    wanted = model.generate(**given, **asked, cache_implementation="sink")
    text = "".join(begun)
    assert text == _Words().decode(wanted[0, given["input_ids"].shape[1] :])
    longer, before = {**given, "input_ids": wanted}, begun.cache.clone()
    more = stream(model, _Processor(longer), [*chat, {"content": "and?"}], past_key_values=begun.cache, **asked)
    assert len("".join(more).split()) == 6
    again = {"input_ids": torch.cat((wanted, given["input_ids"]), dim=1)}
    again["pixel_values"] = torch.cat((given["pixel_values"], media.images(model, 2, seed=7)["pixel_values"]))
    found = "".join(stream(model, _Processor(again), chat, past_key_values=before, **asked))
    wanted = model.generate(**again, max_new_tokens=6, do_sample=False)
    assert found == _Words().decode(wanted[0, again["input_ids"].shape[1] :])


def test_kept_streams_never_take_one_image_for_another():
    """The ids of two prompts are the same, and their images are not; a text of these ids is not kept."""
    model = built("llava")
    streaming(model)
    given, asked = media.prompt(model, ROWS), {"max_new_tokens": 4, "do_sample": False, **BIG}
    text = {name: given[name] for name in ("input_ids", "attention_mask")}
    model.generate(**text, **asked, keep_streams=2)
    assert len(kept_streams) == 0
    other = {**given, **media.images(model, 2, seed=7)}
    first = model.generate(**given, **asked, keep_streams=2)
    found = model.generate(**other, **asked, keep_streams=2)
    assert torch.equal(found, model.generate(**other, **asked))
    assert not torch.equal(found, first)
    assert torch.equal(first, model.generate(**given, **asked))
    assert len(kept_streams) == 2
    kept_streams.clear()


@torch.no_grad()
def test_what_an_encoder_made_of_a_prompt_may_be_handed_on_with_each_token():
    """As old versions do (image_hidden_states)."""
    model = built("idefics3")
    streaming(model)
    given = media.prompt(model, [[3, "image", 4]])
    wanted, found = (model.generate(**given, **ASKED, **sink) for sink in ({}, BIG))
    assert torch.equal(found.sequences, wanted.sequences)


@pytest.mark.parametrize("size", [None, 5], ids=["at once", "in pieces"])
@torch.no_grad()
def test_images_that_a_model_leaves_out_of_a_later_turn_are_refused(size):
    """As some versions do; the cache goes on."""
    skip_without_later_images()
    model, left_out = copy.deepcopy(built("llava")), []
    decoder = model.get_decoder()

    def leave_out(_module, args, kwargs):
        return (args, {**kwargs, "inputs_embeds": decoder.get_input_embeddings()(left_out.pop())}) if left_out else None

    decoder.register_forward_pre_hook(leave_out, with_kwargs=True, prepend=True)
    given = media.prompt(model, [[2, "image", 3]])
    columns = given["input_ids"].shape[1]
    cache = SinkCache(W, S, model=model)
    model(**given, **{cache_name(model): cache})
    mask = torch.ones(1, 2 * columns, dtype=torch.long)
    asked = {**given, "attention_mask": mask, "max_new_tokens": 1, "prefill_chunk_size": size, cache_name(model): cache}
    left_out.append(given["input_ids"])
    with pytest.raises(UnsupportedGenerationError, match="puts images into its first prompt alone"):
        model.generate(**asked)
    assert not left_out
    model.generate(**asked)
    assert cache.get_seq_length() == 2 * columns
