"""What `generate` was given reaches each piece of a prompt, and the prompt before drafts; or it is refused."""

from __future__ import annotations

import copy
import functools
import inspect

import pytest
import torch
from transformers import LlamaForCausalLM

from sink_patch import SinkCache, UnsupportedGenerationError
from sink_patch.compat.models import TYPES
from sink_patch.generation.inputs.pieces import PieceInputs, with_types_of
from sink_patch.streaming.media.given import check_media, media_among
from tests.support import zoo
from tests.support.exact import EXACT
from tests.support.oracle import relative_error
from tests.support.tiny import tiny, tokens

CONTEXT, NEW, PROMPT = 64, 10, 8
SINK = {"cache_implementation": "sink", "window_length": 40, "num_sink_tokens": 4}
WAYS = {
    "at once": {},
    "beams": {"num_beams": 3},
    "pieces": {"prefill_chunk_size": 3},
    "single tokens": {"prefill_chunk_size": 1},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "both": {"prompt_lookup_num_tokens": 3, "prefill_chunk_size": 3},
}


class Toned(LlamaForCausalLM):
    """Takes more than a Llama: a tone, a word for how loud it is, and a type and a weight of each token.

    transformers gives a forward its own columns of `token_type_ids`, and all else whole.
    """

    def forward(
        self, input_ids=None, inputs_embeds=None, tone=None, words=(), token_type_ids=None, weights=None, **kwargs
    ):
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)  # [rows, columns, hidden]
        if tone is not None:
            inputs_embeds = inputs_embeds + tone * (3.0 if "loud" in words else 1.0)
        if token_type_ids is not None:
            turned = torch.linspace(-1, 1, inputs_embeds.shape[-1])
            inputs_embeds = inputs_embeds + token_type_ids[..., None] * turned  # as many as there are columns
        if weights is not None and weights.shape[1] == inputs_embeds.shape[1]:
            inputs_embeds = inputs_embeds * weights[..., None]
        return super().forward(inputs_embeds=inputs_embeds, **kwargs)


def with_those_of(forward, other):
    """Let a forward name the arguments of another one too: the name of the cache depends on the version."""
    own, others = (inspect.signature(one).parameters for one in (forward, other))
    named = {**others, **own}
    rest = named.pop("kwargs")
    forward.__signature__ = inspect.Signature([*named.values(), rest])


with_those_of(Toned.forward, LlamaForCausalLM.forward)


@pytest.fixture
def model():
    plain = tiny("llama", layers=1, max_position_embeddings=CONTEXT)
    model = Toned(copy.deepcopy(plain.config)).eval()
    model.load_state_dict(plain.state_dict())
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 500, 0
    return model


def tone(size=64):
    return 2 * torch.randn(1, 1, size, generator=torch.Generator().manual_seed(5))


CARRIED = {
    "a tone": lambda: {"tone": tone()},
    "a tone and words": lambda: {"tone": tone(), "words": ["loud"]},
    "types of tokens": lambda: {"token_type_ids": tokens(PROMPT, seed=3) % 2},
}


def generated(model, ids, **kwargs):
    asked = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(ids, **asked, **kwargs)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CARRIED)
def test_below_the_window_the_text_is_that_of_the_default_cache(model, name, way):
    ids, carried = tokens(PROMPT), CARRIED[name]()
    beams = WAYS["beams"] if way == "beams" else {}
    wanted = generated(model, ids, **carried, **beams).sequences
    assert not torch.equal(wanted, generated(model, ids, **beams).sequences)
    assert torch.equal(generated(model, ids, **carried, **SINK, **WAYS[way]).sequences, wanted)


def test_past_the_context_pieces_are_given_what_the_last_one_is(model):
    """One layer: the first logits are those of a fresh forward over the tokens that are kept."""
    window, sinks = 12, 3
    ids = tokens(99, seed=2)
    sink = {**SINK, "window_length": window, "num_sink_tokens": sinks}
    found = generated(model, ids, tone=tone(), **sink).logits[0]
    kept = torch.cat((ids[:, :sinks], ids[:, sinks - window :]), dim=1)
    with torch.no_grad():
        assert relative_error(found, model(kept, tone=tone(), use_cache=False).logits[:, -1]) < 1e-5


@pytest.mark.parametrize("form", ["history", "new tokens"])
@pytest.mark.parametrize("way", ["pieces", "single tokens", "prompt lookup"])
def test_a_second_turn(model, form, way):
    first = generated(model, tokens(PROMPT), tone=tone(), **SINK)
    history = torch.cat((first.sequences, tokens(9, seed=4)), dim=1)
    read = first.past_key_values.get_seq_length()
    ids = history if form == "history" else history[:, read:]
    carried = {"attention_mask": torch.ones_like(history), "tone": tone()}
    if way == "prompt lookup" and form == "new tokens":
        with pytest.raises(UnsupportedGenerationError):
            generated(model, ids, past_key_values=first.past_key_values, **carried, **WAYS[way])
        return
    found = generated(model, ids, past_key_values=first.past_key_values, **carried, **WAYS[way]).sequences
    wanted = generated(model, history, tone=tone()).sequences
    assert torch.equal(found[:, -NEW:], wanted[:, -NEW:])


@pytest.mark.parametrize("way", [{}, WAYS["pieces"]], ids=["at once", "pieces"])
def test_new_tokens_alone_with_their_types(model, way):
    """transformers does not cut them in a second turn, as all of them are new."""
    first, new = generated(model, tokens(PROMPT), **SINK), tokens(9, seed=4)
    read = first.past_key_values.get_seq_length()
    ids, history = torch.cat((first.sequences[:, read:], new), dim=1), torch.cat((first.sequences, new), dim=1)
    types, cache = tokens(10, seed=3) % 2, first.past_key_values
    given = {"attention_mask": torch.ones_like(history), "token_type_ids": types, "past_key_values": cache}
    found = generated(model, ids, **given, **way)
    whole = torch.cat((torch.zeros(1, read, dtype=torch.long), types), dim=1)
    wanted = generated(model, history, token_type_ids=whole)
    assert relative_error(found.logits[0], wanted.logits[0]) < 1e-5
    assert torch.equal(found.sequences[:, -NEW:], wanted.sequences[:, -NEW:])


@pytest.mark.parametrize("way", ["pieces", "prompt lookup"])
def test_what_has_a_value_for_each_token_and_is_not_cut_is_refused_before_a_piece_goes_in(model, way):
    cache = SinkCache(40, 4, model=model)
    carried = {"weights": torch.rand(1, PROMPT), "past_key_values": cache}
    with pytest.raises(UnsupportedGenerationError, match=r"weights was given for each token.*hands it on whole"):
        generated(model, tokens(PROMPT), **carried, **WAYS[way])
    assert cache.get_seq_length() == 0
    found = generated(model, tokens(PROMPT), **carried).sequences
    assert torch.equal(found, generated(model, tokens(PROMPT), weights=carried["weights"]).sequences)


def test_a_tone_that_is_as_long_as_the_prompt_is_handed_on_whole(model):
    ids, carried = tokens(64), {"tone": tone()}
    model.config.max_position_embeddings = 256
    wanted = generated(model, ids, **carried).sequences
    sink = {**SINK, "window_length": 100}
    assert torch.equal(generated(model, ids, **carried, **sink, **WAYS["pieces"]).sequences, wanted)


def test_a_model_with_columns_of_its_own_in_front_is_refused_before_a_piece_goes_in(model, monkeypatch):
    """As PEFT does for prompt tuning, at the start of a text."""
    made = type(model).prepare_inputs_for_generation

    @functools.wraps(made)
    def in_front(self, input_ids, **kwargs):
        inputs = made(self, input_ids, **kwargs)
        ids = inputs.pop("input_ids")
        inputs["inputs_embeds"] = self.get_input_embeddings()(torch.cat((ids[:, :1], ids), dim=1))
        return inputs

    monkeypatch.setattr(type(model), "prepare_inputs_for_generation", in_front)
    cache = SinkCache(40, 4, model=model)
    with pytest.raises(UnsupportedGenerationError, match="columns of its own before a prompt"):
        generated(model, tokens(PROMPT), past_key_values=cache, **WAYS["pieces"])
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("columns", [20, 12], ids=["of the history", "of the new columns"])
@pytest.mark.parametrize("is_cut", [True, False], ids=["cut", "handed on whole"])
def test_types_of_columns_are_those_of_the_piece_whatever_the_version_does(name, columns, is_cut, monkeypatch):
    """The newest one cuts them as other arguments; up to 5.23 some are handed on whole."""
    model, stream, new = copy.deepcopy(tiny("llama", layers=1)), 20, tokens(12)
    types = torch.arange(stream - columns, stream)[None, :]  # each is its column, [1, columns]

    def prepare(_self, input_ids, **kwargs):
        given = kwargs[name]
        return {"input_ids": input_ids, name: given[:, -input_ids.shape[1] :] if is_cut else given}

    monkeypatch.setattr(type(model), "prepare_inputs_for_generation", prepare)
    pieces = PieceInputs(model, new, stream, {name: types})
    pieces.check()
    for start, end in ((0, 5), (5, 11), (11, 12)):
        made = pieces.of(new[:, start:end], stream - 12 + start)
        assert made[name].tolist() == [list(range(stream - 12 + start, stream - 12 + end))]
    ahead = with_types_of({name: types, "pixel_values": None}, 12, 5)
    assert ahead[name].tolist() == [list(range(8, 13))]


WITH_PARTS = [name for name in EXACT if name not in zoo.NOT_BUILT and name in ("gemma3", "gemma3n", "phi4_multimodal")]


@pytest.mark.parametrize("model_type", WITH_PARTS)
@pytest.mark.parametrize("name", ["image_pixel_values", "audio_input_features", "pictures_of_tomorrow"])
def test_numbers_for_a_model_with_other_parts_are_refused_whatever_they_are_called(model_type, name):
    model = zoo.build(model_type)
    if not set(type(model.config).sub_configs) - {"text_config"}:
        pytest.skip("its decoder alone is built")
    given = {"inputs_embeds": torch.ones(1, 2, 4), "token_type_ids": torch.ones(1, 2, dtype=torch.long)}
    assert not media_among(model, given)
    for value in (torch.ones(1, 3), [torch.ones(3)], {"image": torch.ones(3)}):
        with pytest.raises(UnsupportedGenerationError, match=name):
            check_media(model, {**given, name: value}, 0)


def test_numbers_for_a_model_of_text_alone_are_its_own():
    assert not media_among(copy.deepcopy(tiny("llama", layers=1)), {"tone": torch.ones(1, 3)})
