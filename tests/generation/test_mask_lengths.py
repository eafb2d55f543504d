"""A mask whose length fits neither what is given nor the stream: refused, or of no account where ids tell enough."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

import sink_patch
from sink_patch import SinkArgumentError
from tests.support.modules import no_module_runs
from tests.support.tiny import tiny, tokens
from tests.support.tokenizer import tiny_tokenizer

SINK = {"cache_implementation": "sink", "window_length": 64, "num_sink_tokens": 3}
ASKED = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
READ, HISTORY = 15, 20


@pytest.fixture(scope="module")
def model():
    return tiny("llama", layers=2)


def first(model, rows=1, **asked):
    mask = torch.ones(rows, 10, dtype=torch.long)
    if rows > 1:
        mask[0, :3] = 0
    return model.generate(tokens(10, rows=rows), attention_mask=mask, **ASKED, **asked), mask


def history(out, rows=1):
    return torch.cat((out.sequences, tokens(4, rows=rows, seed=6)), dim=1)  # the last token of the answer is not read


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(
    ("given", "columns"), [(20, 21), (20, 24), (20, 19), (5, 19), (5, 16), (5, 21), (4, 20), (5, 4), (20, 15)]
)
def test_in_a_later_turn(model, rows, given, columns):
    out, mask = first(model, rows, **SINK)
    ids, cache = history(out, rows), out.past_key_values
    other = torch.nn.functional.pad(mask, (0, columns - mask.shape[1]), value=1)  # [rows, columns]
    with no_module_runs(), pytest.raises(SinkArgumentError, match=rf"{columns}\b.*columns|{columns}\]"):
        model.generate(ids[:, HISTORY - given :], attention_mask=other, past_key_values=cache, **ASKED)
    assert cache.get_seq_length() == READ
    whole = torch.nn.functional.pad(mask, (0, HISTORY - mask.shape[1]), value=1)
    wanted = model.generate(ids, attention_mask=whole, **ASKED).sequences
    assert torch.equal(model.generate(ids, attention_mask=whole, past_key_values=cache, **ASKED).sequences, wanted)


@pytest.mark.parametrize("columns", [3, 15, 19, 21])
@pytest.mark.parametrize("kept", [{}, {"keep_streams": 2}])
@pytest.mark.parametrize("model_type", ["llama", "bloom"])
def test_in_a_first_turn_it_does_as_without_a_sink_cache_where_transformers_drops_it(model_type, kept, columns):
    """From some version on it drops a mask of ones, whatever its length; before, such a mask is refused."""
    tested, mask = tiny(model_type, layers=2), torch.ones(1, columns, dtype=torch.long)
    ids = history(first(tested, **SINK, **kept)[0])
    if "_mask_length" in getattr(GenerationConfig, "__annotations__", {}):
        wanted = tested.generate(ids, **ASKED).sequences
        assert torch.equal(tested.generate(ids, attention_mask=mask, **SINK, **kept, **ASKED).sequences, wanted)
    else:
        with no_module_runs(), pytest.raises(SinkArgumentError, match=f"{columns}"):
            tested.generate(ids, attention_mask=mask, **SINK, **kept, **ASKED)


@pytest.mark.parametrize("kept", [{}, {"keep_streams": 2}])
def test_healed_tokens_are_fewer_than_the_mask_says(kept):
    """Healing takes special tokens out of a prompt; its mask, or what is left of it, counts them."""
    model, tokenizer = tiny("llama", layers=2, vocab_size=63), tiny_tokenizer()
    sink_patch.kept_streams.clear()
    asked = {"max_new_tokens": 6, "do_sample": False, "token_healing": True, "tokenizer": tokenizer}
    text = "<s> word7 word9 word11"
    for more in (" <s> word12 word13", " word5", ""):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        wanted = model.generate(ids, **asked)
        assert torch.equal(model.generate(ids, **asked, **SINK, **kept), wanted)
        assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **asked, **SINK, **kept), wanted)
        text = f"<s> {tokenizer.decode(wanted[0])}{more}"


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "bloom"])  # the other one takes no positions, which tell as much
def test_healed_tokens_of_a_later_turn(model_type, is_masked):
    model, tokenizer = tiny(model_type, layers=2, vocab_size=63), tiny_tokenizer()
    asked = {**ASKED, "token_healing": True, "tokenizer": tokenizer}
    ids = tokenizer("<s> word7 word9 word11", return_tensors="pt")["input_ids"]
    out = model.generate(ids, **asked, **SINK)
    text = f"<s> {tokenizer.decode(out.sequences[0])} <s> word12 word13"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    mask = torch.ones_like(ids) if is_masked else None
    try:
        wanted = model.generate(ids, **asked).sequences
    except RuntimeError as error:
        pytest.skip(f"transformers itself keeps the mask of before with this model: {error}")
    found = model.generate(ids, attention_mask=mask, past_key_values=out.past_key_values, **asked)
    assert torch.equal(found.sequences, wanted)
