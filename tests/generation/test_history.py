"""A second turn must begin with what its cache has read; else `generate` says from which token on it does not."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo

from sink_patch import CacheStateError, HistoryMismatchError, SinkArgumentError, SinkCache
from tests.support.graphs import graph_config
from tests.support.modules import no_module_runs
from tests.support.oracle import relative_error, visible_tokens
from tests.support.saved import FORMAT_1, steady_model, steady_text
from tests.support.tiny import tiny, tokens

W, S = 40, 4
SINK = {"cache_implementation": "sink", "window_length": W, "num_sink_tokens": S}
PROMPT, NEW = 20, 30
READ = PROMPT + NEW - 1
NO_END = {"eos_token_id": 500, "pad_token_id": 501}  # prompt lookup needs these


@pytest.fixture(scope="module")
def model():
    return copy.deepcopy(tiny("llama"))  # transformers keeps what it compiles on the model, which others share


def run(model, ids, *, new=NEW, **settings):
    asked = {"do_sample": False, "max_new_tokens": new, "return_dict_in_generate": True, **NO_END}
    return model.generate(ids, **{**asked, **settings})


def turn(rows=1, columns=10):
    return tokens(columns, rows=rows, seed=5)


def joined(*parts):
    return torch.cat(parts, dim=1)


def with_other(ids, place):
    ids = ids.clone()
    ids[0, place] = (ids[0, place] + 1) % 90 + 2
    return ids


EDITS = {
    "one token": lambda text: (with_other(text, 33), 33),
    "the first token": lambda text: (with_other(text, 0), 0),
    "the last that was read": lambda text: (with_other(text, READ - 1), READ - 1),
    "thoughts stripped": lambda text: (joined(text[:, :25], text[:, 35:], tokens(20, seed=6)), 25),
    "another chat": lambda text: (tokens(text.shape[1], seed=7), 0),
    "turns trimmed": lambda text: (joined(text[:, :8], text[:, 30:]), 8),
    "the oldest turns trimmed": lambda text: (text[:, 25:], 0),
    "the same prompt": lambda text: (text[:, :PROMPT], None),
    "all that was read": lambda text: (text[:, :READ], None),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_another_text_is_refused_and_the_right_one_goes_on(model, edit):
    first = run(model, tokens(PROMPT), **SINK)
    cache, text = first.past_key_values, joined(first.sequences, turn())
    edited, place = edit(text)
    if place is not None:
        place = next(one for one in range(READ) if edited[0, one] != text[0, one])  # it may be the same by chance
    match = "nothing new to feed" if place is None else f"from token {place} on"
    with no_module_runs(), pytest.raises(HistoryMismatchError, match=match):
        run(model, edited, past_key_values=cache)
    assert cache.get_seq_length() == READ
    found = run(model, text, past_key_values=cache, new=1, output_logits=True)
    with torch.no_grad():
        wanted = model(visible_tokens(text, READ, 11, W, S), use_cache=False).logits[:, -1]
    assert relative_error(found.logits[0], wanted) < 1e-5


@pytest.mark.parametrize("fed", ["the history", "a mask over the whole stream", "new tokens alone"])
def test_what_goes_on_is_never_refused(model, fed):
    """Also where a new turn says again what was said first, if a mask tells that it is new."""
    first = run(model, tokens(PROMPT), **SINK)
    new = turn() if fed == "new tokens alone" else tokens(PROMPT)
    whole = joined(first.sequences, new)
    ids = whole if fed == "the history" else whole[:, READ:]
    mask = {} if fed == "new tokens alone" else {"attention_mask": torch.ones_like(whole)}
    run(model, ids, past_key_values=first.past_key_values, **mask)


def test_single_tokens_are_new_whatever_they_are(model):
    first = run(model, tokens(PROMPT), **SINK)
    for _ in range(3):
        run(model, tokens(PROMPT)[:, :1], past_key_values=first.past_key_values, new=1)
    assert first.past_key_values.get_seq_length() == READ + 3


WAYS = {
    "sampled": {"do_sample": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assistant": {"assistant_model": "another"},
    "itself as assistant": {"assistant_model": "itself"},
    "pieces": {"prefill_chunk_size": 7},
    "compiled": {"compile_config": "eager"},
}


def settings_of(way, model):
    asked = dict(WAYS[way])
    if "assistant_model" in asked:
        asked["assistant_model"] = tiny("llama", seed=1) if asked["assistant_model"] == "another" else model
    if "compile_config" in asked:
        asked["compile_config"] = graph_config()
    return asked


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("way", WAYS)
def test_whatever_decodes_the_cache_knows_what_it_has_read(model, way):
    torch._dynamo.reset()
    asked = settings_of(way, model)
    text = tokens(PROMPT)
    cache = SinkCache(W, S)
    for number in range(3):
        out = run(model, text, past_key_values=cache, **asked)
        with pytest.raises(HistoryMismatchError, match=r"from token 30 on"):
            run(model, joined(with_other(out.sequences, 30), turn()), past_key_values=cache, **asked)
        text = joined(out.sequences, tokens(10, seed=number + 8))
    assert cache.get_seq_length() == 3 * NEW + PROMPT + 2 * 10 - 1


@pytest.mark.parametrize("way", ["clone", "file"])
def test_copies_know_it_too(model, way, tmp_path):
    first = run(model, tokens(PROMPT), **SINK)
    cache = first.past_key_values.clone()
    if way == "file":
        cache.save(tmp_path / "cache")
        cache = SinkCache.load(tmp_path / "cache", model=model)
    text = joined(first.sequences, turn())
    with pytest.raises(HistoryMismatchError, match="from token 33 on"):
        run(model, with_other(text, 33), past_key_values=cache)
    run(model, text, past_key_values=cache)


def test_what_was_cropped_may_be_another_text(model):
    cache = SinkCache(100, S)
    first = run(model, tokens(PROMPT), past_key_values=cache)
    cache.crop(-19)
    text = joined(first.sequences[:, :30], turn())
    with pytest.raises(HistoryMismatchError, match="from token 29 on"):
        run(model, with_other(text, 29), past_key_values=cache)
    text = joined(first.sequences[:, :30], with_other(first.sequences, 30)[:, 30:])
    assert torch.equal(run(model, text, past_key_values=cache).sequences, run(model, text).sequences)


def test_a_row_is_named(model):
    ids, mask = tokens(PROMPT, rows=2), torch.ones(2, PROMPT, dtype=torch.long)
    mask[1, :4] = 0
    first = run(model, ids, attention_mask=mask, **SINK)
    text = joined(first.sequences, turn(rows=2))
    masked = {"attention_mask": joined(mask, torch.ones_like(text[:, PROMPT:]))}
    other = text.clone()
    other[1, 24] = (other[1, 24] + 1) % 90 + 2
    with pytest.raises(HistoryMismatchError, match=r"^Row 1 of input_ids .* 45 tokens .* from token 20 on"):
        run(model, other, past_key_values=first.past_key_values, **masked)
    run(model, text, past_key_values=first.past_key_values, **masked)


def test_the_rows_of_beams_are_checked_as_they_are(model):
    """The best of them may have been another row's at the end."""
    first = run(model, tokens(PROMPT), num_beams=3, num_return_sequences=3, **SINK)
    cache = first.past_key_values
    assert cache.batch_size == 3
    with pytest.raises(HistoryMismatchError, match="input_ids"):
        run(model, joined(with_other(first.sequences[:1], 2), turn()), num_beams=3, past_key_values=cache)


def test_what_is_not_known_is_not_checked(model):
    """Embeddings, and a file of before."""
    embeds = model.get_input_embeddings()(tokens(PROMPT)).detach()
    cache = run(model, None, inputs_embeds=embeds, **SINK).past_key_values
    run(model, tokens(60), past_key_values=cache)
    steady = steady_model()
    cache = SinkCache.load(FORMAT_1, model=steady)
    run(steady, (steady_text(60) + 1) % 90, past_key_values=cache)


def test_what_a_mask_hides_of_the_past_is_read_anew_without_it_or_refused(model):
    first = run(model, tokens(PROMPT), **SINK)
    text = joined(first.sequences, turn())
    mask = torch.ones_like(text)
    mask[0, :3] = 0
    with pytest.raises(CacheStateError, match="newest 49 tokens that row 0.*now calls padding"):
        run(model, text, attention_mask=mask, past_key_values=first.past_key_values)
    cache = SinkCache(100, S)
    text = joined(run(model, tokens(PROMPT), past_key_values=cache).sequences, turn())
    found = run(model, text, attention_mask=mask, past_key_values=cache)
    assert torch.equal(found.sequences, run(model, text, attention_mask=mask).sequences)
    with pytest.raises(SinkArgumentError, match="other tokens of the past real"):
        run(model, text[:, READ:], attention_mask=mask, past_key_values=first.past_key_values)


def test_a_broken_cache_says_that_it_is_broken(model):
    first = run(model, tokens(PROMPT), **SINK)
    handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    text = joined(first.sequences, turn())
    with pytest.raises(ZeroDivisionError):
        run(model, text, past_key_values=first.past_key_values)
    handle.remove()
    with pytest.raises(CacheStateError, match="half-way"):
        run(model, with_other(text, 3), past_key_values=first.past_key_values)
