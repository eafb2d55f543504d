"""`cache_implementation="sink"` in `generate`."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from transformers import GenerationConfig

import sink_patch
from sink_patch import SinkArgumentError, SinkCache
from sink_patch.generation.inputs import pieces
from tests.support.oracle import relative_error, visible_tokens
from tests.support.tiny import tiny, tokens

W, S = 12, 3
PROMPT = tokens(6)


def run(model, ids=PROMPT, *, new=40, **kwargs):
    kwargs = {"do_sample": False, "max_new_tokens": new, "return_dict_in_generate": True, **kwargs}
    return model.generate(ids, **kwargs)


@pytest.fixture
def model():
    """A model with its own generation config, so that tests may change it."""
    shared = tiny("llama", layers=1, max_position_embeddings=64)
    model = copy.copy(shared)
    model.generation_config = copy.deepcopy(shared.generation_config)
    return model


def sizes(cache):
    return cache.window_length, cache.num_sink_tokens


def test_the_logits_of_each_token_equal_the_oracle(model):
    out = run(model, new=150, cache_implementation="sink", window_length=W, num_sink_tokens=S, output_logits=True)
    assert isinstance(out.past_key_values, SinkCache)
    stream = out.sequences
    for step, logits in enumerate(out.logits):
        seen = 0 if step == 0 else PROMPT.shape[1] + step - 1
        visible = visible_tokens(stream, seen, PROMPT.shape[1] if step == 0 else 1, W, S)
        with torch.no_grad():
            assert relative_error(logits, model(visible, use_cache=False).logits[:, -1]) < 1e-5


CASES_OF_SIZES = {
    "arguments": ({"cache_implementation": "sink", "window_length": W, "num_sink_tokens": S}, {}),
    "cache_config": ({"cache_implementation": "sink", "cache_config": {"window_length": W, "num_sink_tokens": S}}, {}),
    "entries of the config": ({}, {"cache_implementation": "sink", "window_length": W, "num_sink_tokens": S}),
    "cache_config of the config": (
        {},
        {"cache_implementation": "sink", "cache_config": {"window_length": W, "num_sink_tokens": S}},
    ),
    "an argument beside the config": (
        {"cache_implementation": "sink"},
        {"window_length": W, "cache_config": {"num_sink_tokens": S}},
    ),
    "an argument beats the config": (
        {"window_length": W},
        {"cache_implementation": "sink", "window_length": 99, "num_sink_tokens": S},
    ),
    "an argument beats cache_config": (
        {"window_length": W, "cache_config": {"window_length": 77, "num_sink_tokens": S}},
        {"cache_implementation": "sink"},
    ),
    "cache_config beats the config's entries": (
        {"cache_config": {"window_length": W}},
        {"cache_implementation": "sink", "window_length": 99, "num_sink_tokens": S},
    ),
}


@pytest.mark.parametrize("case", CASES_OF_SIZES)
def test_sizes_may_be_given_in_many_ways(model, case, tmp_path):
    arguments, entries = CASES_OF_SIZES[case]
    GenerationConfig(**entries).save_pretrained(tmp_path)
    model.generation_config = GenerationConfig.from_pretrained(tmp_path)
    before = copy.deepcopy(model.generation_config.to_dict())
    out = run(model, **arguments)
    assert sizes(out.past_key_values) == (W, S)
    assert model.generation_config.to_dict() == before


@pytest.mark.parametrize("other", [None, "dynamic", "static"])
def test_a_call_may_ask_for_another_cache_than_the_config(model, other):
    """4.52 and 4.53 would pass the sizes in the config to the other cache, which refuses them."""
    wanted = run(model).sequences
    model.generation_config.cache_implementation = "sink"
    model.generation_config.cache_config = {"window_length": W, "num_sink_tokens": S}
    before = copy.deepcopy(model.generation_config.to_dict())
    out = run(model, cache_implementation=other)
    assert not isinstance(out.past_key_values, SinkCache)
    assert torch.equal(out.sequences, wanted)
    assert model.generation_config.to_dict() == before


def test_a_config_may_be_passed(model):
    config = GenerationConfig(
        cache_implementation="sink", window_length=W, max_new_tokens=20, return_dict_in_generate=True
    )
    before = config.to_dict()
    out = model.generate(PROMPT, generation_config=config)
    assert sizes(out.past_key_values) == (W, 4)
    assert config.to_dict() == before


def test_default_sizes(model):
    assert sizes(run(model, cache_implementation="sink").past_key_values) == (256, 4)


def test_a_cache_may_be_passed_bound_or_not(model):
    wanted = run(model, cache_implementation="sink", window_length=W, num_sink_tokens=S).sequences
    for cache in (SinkCache(W, S), SinkCache(W, S, model=model)):
        out = run(model, past_key_values=cache)
        assert out.past_key_values is cache
        assert torch.equal(out.sequences, wanted)
    model.generation_config.cache_implementation = "sink"  # also if the config asks for a sink cache
    assert torch.equal(run(model, past_key_values=SinkCache(W, S)).sequences, wanted)


@pytest.mark.parametrize("history", [True, False])
def test_a_second_turn_continues_the_first(model, history):
    first = run(model, cache_implementation="sink", window_length=W, num_sink_tokens=S)
    turn = tokens(5, seed=1)
    whole = torch.cat((first.sequences, turn), dim=1)
    cache = first.past_key_values
    fed = cache.get_seq_length()
    mask = torch.ones_like(whole)
    new = whole if history else whole[:, fed:]
    second = run(model, new, past_key_values=cache, attention_mask=mask, output_logits=True, new=1)
    with torch.no_grad():
        wanted = model(visible_tokens(whole, fed, whole.shape[1] - fed, W, S), use_cache=False).logits[:, -1]
    assert relative_error(second.logits[0], wanted) < 1e-5


def test_a_second_turn_of_new_tokens_needs_no_mask(model):
    first = run(model, cache_implementation="sink", window_length=W, num_sink_tokens=S)
    cache, turn = first.past_key_values, torch.cat((first.sequences[:, -1:], tokens(5, seed=1)), dim=1)
    whole = torch.cat((first.sequences, turn[:, 1:]), dim=1)
    out = run(model, turn, past_key_values=cache, output_logits=True, new=3)
    with torch.no_grad():
        wanted = model(visible_tokens(whole, whole.shape[1] - 6, 6, W, S), use_cache=False).logits[:, -1]
    assert relative_error(out.logits[0], wanted) < 1e-5
    assert out.past_key_values.get_seq_length() == whole.shape[1] + 2


def test_a_second_turn_may_have_the_mask_of_its_new_tokens_alone(model):
    """Tokenizers return such a mask for a batch of new messages; the cache knows the padding of the first turn."""
    ids, mask = tokens(9, rows=2), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    sink = {"cache_implementation": "sink", "window_length": W, "num_sink_tokens": S}
    first = run(model, ids, attention_mask=mask, pad_token_id=0, **sink)
    turn, new_mask = tokens(6, rows=2, seed=1), torch.ones(2, 6, dtype=torch.long)
    new_mask[0, :2] = 0
    fed, last = first.past_key_values.get_seq_length(), first.sequences[:, -1:]
    ids_of_turn = torch.cat((last, turn), dim=1)
    mask_of_turn = torch.cat((torch.ones_like(last), new_mask), dim=1)
    # padding is to the left of all new tokens of a row
    ids_of_turn[0, :3] = torch.cat((turn[0, :2], last[0]))
    mask_of_turn[0, :3] = torch.tensor([0, 0, 1])
    more = {"output_logits": True, "new": 1, "pad_token_id": 0}
    out = run(model, ids_of_turn, past_key_values=first.past_key_values, attention_mask=mask_of_turn, **more)
    for row, (start, skipped) in enumerate(((0, 2), (4, 0))):
        whole = torch.cat((first.sequences[row, start:], turn[row, skipped:]))[None]
        new = 7 - skipped
        with torch.no_grad():
            visible = visible_tokens(whole, whole.shape[1] - new, new, W, S)
            wanted = model(visible, use_cache=False).logits[:, -1]
        assert relative_error(out.logits[0][row : row + 1], wanted) < 1e-5
    assert out.past_key_values.get_seq_length() == fed + 7


@pytest.mark.parametrize("mode", [{"do_sample": True}, {"num_beams": 3}, {"num_beams": 2, "do_sample": True}])
def test_below_the_window_every_mode_equals_the_default_cache(mode):
    model = tiny("llama", layers=2)
    texts = []
    for cache in ({}, {"cache_implementation": "sink", "window_length": 64}):
        torch.manual_seed(0)
        texts.append(run(model, tokens(6, rows=2), **mode, **cache).sequences)
    assert torch.equal(*texts)


@pytest.mark.parametrize("mode", [{"do_sample": True, "num_return_sequences": 2}, {"num_beams": 3}])
def test_other_modes_stream_past_the_window(mode):
    out = run(tiny("llama", layers=2), **mode, cache_implementation="sink", window_length=W, num_sink_tokens=S)
    assert out.sequences.shape[1] > 3 * W
    assert isinstance(out.past_key_values, SinkCache)


def test_padded_rows_give_the_same_text_as_alone():
    model = tiny("llama", layers=2)
    ids, mask = tokens(9, rows=2), torch.ones(2, 9, dtype=torch.long)
    mask[1, :5] = 0
    sink = {"cache_implementation": "sink", "window_length": W, "num_sink_tokens": S}
    together = run(model, ids, attention_mask=mask, pad_token_id=0, **sink).sequences
    for row, start in ((0, 0), (1, 5)):
        assert torch.equal(together[row, start:], run(model, ids[row : row + 1, start:], **sink).sequences[0])


@pytest.mark.parametrize("way", ["sink", "a new cache", "a cache that is bound"])
@pytest.mark.parametrize("drafts", [{}, {"prompt_lookup_num_tokens": 3}], ids=["plain", "drafts"])
def test_the_model_is_examined_once_in_a_call(way, drafts):
    model, examined = copy.deepcopy(tiny("llama", layers=1)), []

    @sink_patch.register_family("counted")
    def counted(model):
        examined.append(model)
        return sink_patch.rope("half")(model)

    model.config.model_type = "counted"
    if way == "sink":
        asked = {"cache_implementation": "sink"}
    else:
        asked = {"past_key_values": SinkCache(model=model if way == "a cache that is bound" else None)}
    examined.clear()
    run(model, new=5, eos_token_id=96, pad_token_id=0, **asked, **drafts)
    assert examined == [model]


def test_embeddings_may_be_the_prompt(model):
    sink = {"cache_implementation": "sink", "window_length": W, "num_sink_tokens": S}
    wanted = run(model, **sink).sequences[:, PROMPT.shape[1] :]
    embeds = model.get_input_embeddings()(PROMPT).detach()
    assert torch.equal(model.generate(inputs_embeds=embeds, max_new_tokens=40, do_sample=False, **sink), wanted)


def test_a_prompt_longer_than_the_context_is_fed_in_pieces_and_logged_once(model, caplog, monkeypatch):
    monkeypatch.setattr(pieces, "_has_told", False)
    prompt = tokens(200)  # the context has 64 positions
    sink = {"cache_implementation": "sink", "window_length": W, "num_sink_tokens": S, "new": 1, "output_logits": True}
    with caplog.at_level(logging.INFO, logger="sink_patch"):
        found = run(model, prompt, **sink).logits[0]
        run(model, prompt, **sink)
    assert [record.getMessage() for record in caplog.records if record.name == "sink_patch"] == [
        "A prompt of 200 tokens is longer than the model's context: it goes into the sink cache in pieces of 9."
    ]
    visible = visible_tokens(prompt, 198, 2, W, S)  # 200 = 22 * 9 + 2
    with torch.no_grad():
        assert relative_error(found, model(visible, use_cache=False).logits[:, -1]) < 1e-5


def test_prefill_chunk_size_is_used(model):
    prompt = tokens(50)
    sink = {"cache_implementation": "sink", "window_length": W, "num_sink_tokens": S}
    found = run(model, prompt, new=1, output_logits=True, prefill_chunk_size=7, **sink).logits[0]
    with torch.no_grad():
        wanted = model(visible_tokens(prompt, 49, 1, W, S), use_cache=False).logits[:, -1]  # 50 = 7 * 7 + 1
    assert relative_error(found, wanted) < 1e-5


@pytest.mark.parametrize("extra", [{"prefill_chunk_size": 7}, {}], ids=["chunks", "past the context"])
def test_embeddings_are_fed_in_pieces_too(model, extra):
    prompt = tokens(50 if extra else 130)
    sink = {"cache_implementation": "sink", "window_length": W, "num_sink_tokens": S, "new": 20}
    wanted = run(model, prompt, **sink, **extra).sequences[:, prompt.shape[1] :]
    embeds = model.get_input_embeddings()(prompt).detach()
    assert torch.equal(run(model, None, inputs_embeds=embeds, **sink, **extra).sequences, wanted)


@pytest.mark.parametrize("history", [True, False])
@pytest.mark.parametrize("mask", [True, False])
def test_a_second_turn_is_fed_in_pieces_too(model, history, mask):
    first = run(model, cache_implementation="sink", window_length=W, num_sink_tokens=S)
    fed = first.past_key_values.get_seq_length()
    whole = torch.cat((first.sequences, tokens(20, seed=1)), dim=1)
    new = whole if history else whole[:, fed:]
    more = {"attention_mask": torch.ones_like(whole)} if mask or history else {}
    more |= {"past_key_values": first.past_key_values, "prefill_chunk_size": 8, "output_logits": True, "new": 1}
    out = run(model, new, **more)
    with torch.no_grad():  # 21 = 8 + 8 + 5
        wanted = model(visible_tokens(whole, whole.shape[1] - 5, 5, W, S), use_cache=False).logits[:, -1]
    assert relative_error(out.logits[0], wanted) < 1e-5
    assert torch.equal(out.sequences[:, : new.shape[1]], new)


def test_a_second_turn_must_have_a_new_token_for_each_row(model):
    """The only new column of one row is padding. It is checked, unlike the single tokens that `generate` makes."""
    sink = {"cache_implementation": "sink", "window_length": W, "num_sink_tokens": S, "pad_token_id": 0}
    first = run(model, tokens(6, rows=2), new=20, **sink)
    cache, fed = first.past_key_values, first.past_key_values.get_seq_length()
    mask = torch.ones(2, fed + 1, dtype=torch.long)
    mask[1, -1] = 0
    with pytest.raises(SinkArgumentError, match="padding to the right"):
        run(model, tokens(1, rows=2), past_key_values=cache, attention_mask=mask, new=1, pad_token_id=0)
    assert cache.get_seq_length() == fed
