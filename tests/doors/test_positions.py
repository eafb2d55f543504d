"""Positions of the caller's own, in a forward and in `generate`: the same as those of the cache, or refused."""

from __future__ import annotations

import pytest
import torch

from sink_patch import SinkArgumentError, SinkCache
from tests.support.caches import default_cache
from tests.support.known_gaps import skip_if_model_is_newer
from tests.support.modules import no_module_runs
from tests.support.tiny import tiny, tokens

W, S = 12, 3
SIZES = {"window_length": W, "num_sink_tokens": S}
SINK = {"cache_implementation": "sink", **SIZES}
LENGTHS = {"below the window": 6, "beyond": 30}
FAMILIES = {"llama": {}, "gpt_neox": {}, "smollm3": {}, "mistral": {"sliding_window": 7}, "qwen3": {}}
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8])


def own(count: int, first: int = 0) -> torch.Tensor:
    return torch.arange(first, first + count)[None]


WRONG = {
    "from 1 on": lambda count, first: own(count, first + 1),
    "from 0 on once more": lambda count, first: own(count) if first else own(count) * 2,
    "backwards": lambda count, first: own(count, first).flip(-1),
    "all the same": lambda count, first: torch.full((1, count), 7),
    "one is off": lambda count, first: own(count, first) + (own(count) == count - 2),
    "several coordinates": lambda count, first: (own(count, first) * 2).expand(3, 1, count),
}


@torch.no_grad()
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_forward_refuses_what_the_cache_does_not_count(model_type, length, wrong):
    skip_if_model_is_newer(model_type)
    model, stream = tiny(model_type, **FAMILIES[model_type]), tokens(length + 4)
    cache, twin = (SinkCache(W, S, model=model) for _ in range(2))
    for one in (cache, twin):
        model(stream[:, :length], past_key_values=one, position_ids=own(length))
    with pytest.raises(SinkArgumentError, match="position_ids .* counts the tokens of each row"):
        model(stream[:, length:], past_key_values=cache, position_ids=WRONG[wrong](4, length))
    assert cache.get_seq_length() == length
    found = model(stream[:, length:], past_key_values=cache, position_ids=own(4, length)).logits
    assert torch.equal(found, model(stream[:, length:], past_key_values=twin).logits)


@torch.no_grad()
@pytest.mark.parametrize("given", [own(3), torch.tensor(5), own(4, 6).expand(3, 4), [[6, 7, 8, 9]]], ids=str)
def test_a_forward_refuses_positions_of_another_shape(given):
    model, stream = tiny("llama"), tokens(10)
    cache = SinkCache(W, S, model=model)
    model(stream[:, :6], past_key_values=cache)
    with pytest.raises(SinkArgumentError, match="position_ids .*Leave it out"):
        model(stream[:, 6:], past_key_values=cache, position_ids=given)
    assert cache.get_seq_length() == 6


@torch.no_grad()
@pytest.mark.parametrize("of_padding", [0, 1, 99])
def test_a_forward_of_padded_rows(of_padding):
    """Each row counts its own tokens; what stands at padding does not matter."""
    model, stream = tiny("llama"), tokens(30, rows=2)
    mask = torch.cat((MASK, torch.ones(2, 22, dtype=torch.long)), dim=1)
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, of_padding)
    cache, twin = (SinkCache(W, S, model=model) for _ in range(2))
    for start, stop in ((0, 8), (8, 12), *((at, at + 1) for at in range(12, 30))):
        ids, known = stream[:, start:stop], mask[:, :stop]
        with pytest.raises(SinkArgumentError, match="position_ids"):
            model(ids, past_key_values=cache, attention_mask=known, position_ids=own(stop - start, start))
        found = model(ids, past_key_values=cache, attention_mask=known, position_ids=positions[:, start:stop]).logits
        assert torch.equal(found, model(ids, past_key_values=twin, attention_mask=known).logits)


@torch.no_grad()
def test_the_decoder_entered_by_itself():
    model, ids = tiny("llama"), tokens(6)
    cache = SinkCache(W, S, model=model)
    with pytest.raises(SinkArgumentError, match="position_ids"):
        model.model(ids, past_key_values=cache, position_ids=own(6, 1))
    model.model(ids, past_key_values=cache, position_ids=own(6))


@torch.no_grad()
def test_a_model_without_positions_passes_them_over_as_ever():
    model = tiny("falcon", alibi=True)
    ids, cache = tokens(6), SinkCache(W, S, model=model)
    found = model(ids, past_key_values=cache, position_ids=own(6, 9)).logits
    assert torch.allclose(found, model(ids, past_key_values=default_cache(model)).logits, atol=1e-5)


def ways(model):
    """How a call may ask for a sink cache."""
    return (SINK, {"past_key_values": SinkCache(W, S)}, {"past_key_values": SinkCache(W, S, model=model)})


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_generate_refuses_what_the_cache_does_not_count(model_type, length, wrong):
    skip_if_model_is_newer(model_type)
    model, ids = tiny(model_type, **FAMILIES[model_type]), tokens(length)
    given = {"max_new_tokens": 3, "do_sample": False}
    for asked in ways(model):
        with no_module_runs(), pytest.raises(SinkArgumentError, match="position_ids .* counts the tokens of each row"):
            model.generate(ids, position_ids=WRONG[wrong](length, 0), **given, **asked)
    for asked in ways(model):
        found = model.generate(ids, position_ids=own(length), **given, **asked)
        assert torch.equal(found, model.generate(ids, **given, **SINK))


@pytest.mark.parametrize("more", [{}, {"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_generate_with_padded_rows(more):
    model, ids = tiny("llama"), tokens(8, rows=2)
    given = {"attention_mask": MASK, "max_new_tokens": 20, "do_sample": False, **more, **SINK}
    with no_module_runs(), pytest.raises(SinkArgumentError, match="position_ids"):
        model.generate(ids, position_ids=own(8).expand(2, 8), **given)
    positions = (MASK.cumsum(-1) - 1).masked_fill(MASK == 0, 1)
    torch.manual_seed(0)
    found = model.generate(ids, position_ids=positions, **given)
    torch.manual_seed(0)
    assert torch.equal(found, model.generate(ids, **given))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("form", ["history", "history, positions of new tokens", "new tokens"])
@pytest.mark.parametrize("first", [4, 20])
def test_a_second_turn(first, form, masked):
    model, stream = tiny("llama"), tokens(first + 14)
    given = {"max_new_tokens": 3, "do_sample": False}

    def turn(**positions):
        cache = SinkCache(W, S, model=model)
        out = model.generate(stream[:, :first], past_key_values=cache, max_new_tokens=10, return_dict_in_generate=True)
        history = torch.cat((out.sequences, stream[:, -4:]), dim=1)  # [1, first + 14], one of them not read
        ids = history if form.startswith("history") else history[:, cache.get_seq_length() :]
        mask = {"attention_mask": torch.ones_like(history)} if masked else {}
        return model.generate(ids, past_key_values=cache, **positions, **mask, **given)[:, -7:]

    total = first + 14
    right = own(total) if form == "history" else own(5, total - 5)
    assert torch.equal(turn(position_ids=right), turn())
    with pytest.raises(SinkArgumentError, match="position_ids"):
        turn(position_ids=right + 1)
    with pytest.raises(SinkArgumentError, match="position_ids"):
        turn(position_ids=own(5))


def test_other_caches_take_any_positions():
    model, ids = tiny("llama"), tokens(6)
    given = {"max_new_tokens": 3, "do_sample": False}
    model.generate(ids, position_ids=own(6, 5), **given)
    model(ids, position_ids=own(6, 5), past_key_values=default_cache(model))
