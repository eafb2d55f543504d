"""While nothing has left the window, a sink cache gives the same results as transformers' `DynamicCache`."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from sink_patch import SinkCache
from tests.support.caches import default_cache
from tests.support.oracle import relative_error
from tests.support.tiny import FAMILIES, can_have, tiny, tokens

W = 64
PROMPT, NEW = 10, 31
FED = PROMPT + NEW - 1  # the last token that is generated is not fed
SCHEDULES = {
    "one forward": [W],
    "in chunks": [10, 1, 23, 7, 1, 22],
    "token by token": [1] * W,
    "in a chunk and token by token": [40] + [1] * 24,
}


def two_layers(model_type: str) -> PreTrainedModel:
    """Two layers, of two kinds where the family has them; sliding windows are shorter than the text."""
    spec = FAMILIES[model_type]
    # a random model with tied embeddings repeats its last token, whatever it attends to
    settings: dict[str, Any] = {"tie_word_embeddings": False}
    mixed = ["sliding_attention", "full_attention"]
    if "layers" in spec and can_have(model_type, mixed):
        settings |= {"layer_types": mixed, "sliding_window": 7}
    elif spec.get("sliding"):
        settings |= {"sliding_window": 30}  # of all layers; longer than the short window of the tests below
    elif "no_rope" in spec:
        settings |= {"no_rope_layers": [1, 0]}
    return tiny(model_type, layers=2, **settings)


@torch.no_grad()
def fed(model: PreTrainedModel, cache: Cache, stream: torch.Tensor, schedule: list[int]) -> list[torch.Tensor]:
    """All logits of each forward of a schedule."""
    pieces = stream[:, : sum(schedule)].split(schedule, dim=1)
    return [model(piece, past_key_values=cache).logits for piece in pieces]


@torch.no_grad()
def fed_by_default(model: PreTrainedModel, stream: torch.Tensor, schedule: list[int]) -> list[torch.Tensor]:
    """The same with the default cache of transformers."""
    cache = default_cache(model, *stream.shape)
    if "cache_position" not in inspect.signature(model.forward).parameters:
        return fed(model, cache, stream, schedule)
    # as `generate` does: 4.52's Gemma 2 reads the length from its first layer, which has a sliding window
    positions = torch.arange(sum(schedule)).split(schedule)
    pieces = stream[:, : sum(schedule)].split(schedule, dim=1)
    steps = zip(pieces, positions, strict=True)
    return [model(piece, past_key_values=cache, cache_position=position).logits for piece, position in steps]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_greedy_text_equals_that_of_the_default_cache_up_to_a_full_window_and_not_after(model_type):
    model, prompt = two_layers(model_type), tokens(PROMPT, rows=2, seed=1)
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW, "attention_mask": torch.ones_like(prompt)}
    wanted = model.generate(prompt, **settings)
    assert wanted.shape[1] == PROMPT + NEW
    for window in (W, FED):  # longer than needed; and so that the last forward fills it exactly
        found = model.generate(prompt, cache_implementation="sink", window_length=window, **settings)
        assert torch.equal(found, wanted), window
    short = model.generate(prompt, cache_implementation="sink", window_length=PROMPT + 2, **settings)
    assert not torch.equal(short, wanted)  # else the text would depend on the last few tokens alone


# Only eager attention must be equal bit for bit: its products run over the same numbers in the same order. A fused
# kernel may choose its blocks by strides, and our buffer is longer than its visible part.
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("rows", [1, 3])
def test_logits_of_llama_equal_those_of_the_default_cache_bit_for_bit_up_to_w_and_differ_after(schedule, rows):
    model, stream = tiny("llama", layers=2), tokens(W + 1, rows=rows)
    schedule = [*schedule, 1]  # one token after W
    found = fed(model, SinkCache(W, 4, model=model), stream, schedule)
    wanted = fed_by_default(model, stream, schedule)
    for step, (one, other) in enumerate(zip(found[:-1], wanted[:-1], strict=True)):
        assert torch.equal(one, other), step
    assert relative_error(found[-1], wanted[-1]) > 1e-2


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_logits_of_each_family_equal_those_of_the_default_cache_up_to_w(model_type, schedule):
    model, stream = two_layers(model_type), tokens(W, rows=2)
    found = fed(model, SinkCache(W, 4, model=model), stream, schedule)
    wanted = fed_by_default(model, stream, schedule)
    worst = max(relative_error(one, other) for one, other in zip(found, wanted, strict=True))
    assert worst <= 1e-5
