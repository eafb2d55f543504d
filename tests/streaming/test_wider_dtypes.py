"""A cache that was begun in one dtype goes on in another, as transformers' default cache does."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from transformers import DynamicCache

from sink_patch import SinkCache
from tests.support.oracle import relative_error
from tests.support.replay import cache_name
from tests.support.tiny import tiny, tokens

W, S, FIRST = 24, 4, 20


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


BEGUN = {
    "autocast, then none": (lambda model: model, autocast, lambda model: model, contextlib.nullcontext),
    "none, then autocast": (lambda model: model, contextlib.nullcontext, lambda model: model, autocast),
    "bfloat16, then float32": (
        lambda model: model.bfloat16(),
        contextlib.nullcontext,
        lambda model: model.float(),
        contextlib.nullcontext,
    ),
    "float32, then float64": (
        lambda model: model,
        contextlib.nullcontext,
        lambda model: model.double(),
        contextlib.nullcontext,
    ),
}


@pytest.mark.parametrize("pieces", [[4], [1] * 4, [3, 1]])
@pytest.mark.parametrize("case", BEGUN)
@torch.no_grad()
def test_within_the_window(case, pieces):
    begin, mode_of_first, go_on, mode = BEGUN[case]
    model, ids = copy.deepcopy(tiny("llama", layers=2)), tokens(FIRST + sum(pieces))
    model, name = begin(model), cache_name(model)
    caches = [SinkCache(W, S, model=model), DynamicCache()]
    with mode_of_first():
        for cache in caches:
            model(ids[:, :FIRST], **{name: cache})
    model, found = go_on(model), []
    with mode():
        for cache in caches:
            end, logits = FIRST, []
            for count in pieces:
                logits.append(model(ids[:, end : end + count], **{name: cache}).logits)
                end += count
            found.append(torch.cat(logits, dim=1))
    assert found[0].dtype == found[1].dtype
    assert relative_error(*found) < (0.02 if mode is autocast else 1e-5)


@pytest.mark.parametrize("rows", [1, 2])
@torch.no_grad()
def test_behind_the_window_it_loses_no_more_than_what_was_rounded(rows):
    """Until the window holds what came in the wider dtype alone, and the sinks."""
    model, ids = copy.deepcopy(tiny("llama", layers=1)), tokens(3 * W, rows=rows)
    name = cache_name(model)
    mask = torch.ones(rows, W + 4, dtype=torch.long)
    mask[0, : 2 * (rows - 1)] = 0  # then the rows have seen different numbers of tokens
    cache, exact = SinkCache(W, S, model=model), SinkCache(W, S, model=model)
    with autocast():
        model(ids[:, : W + 4], attention_mask=mask, **{name: cache})
    model(ids[:, : W + 4], attention_mask=mask, **{name: exact})
    off = []
    for place in range(W + 4, 3 * W):
        token = ids[:, place : place + 1]
        off.append(relative_error(*(model(token, **{name: one}).logits for one in (cache, exact))))
    assert cache.layers[0].keys.dtype == torch.float32
    assert max(off) < 0.02
