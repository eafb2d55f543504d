"""What is no number, no row or no cache is refused before anything is done, and the cache goes on as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sink_patch import SinkArgumentError, SinkCache
from tests.support.replay import cache_name
from tests.support.tiny import tiny, tokens

REFUSED: list[tuple[str, Callable[[SinkCache], object], str]] = [
    ("crop a word", lambda cache: cache.crop("2"), "Give a number of tokens"),
    ("crop a half", lambda cache: cache.crop(-1.5), "Give a number of tokens"),
    ("crop a half in a tensor", lambda cache: cache.crop(torch.tensor(-1.5)), "Give a number of tokens"),
    ("crop nothing", lambda cache: cache.crop(None), "Give a number of tokens"),
    ("crop a bool", lambda cache: cache.crop(True), "Give a number of tokens"),
    ("record a word", lambda cache: cache.activate_past_recording("2"), "Give a number of tokens"),
    ("record a half", lambda cache: cache.activate_past_recording(1.5), "Give a number of tokens"),
    ("record fewer than none", lambda cache: cache.activate_past_recording(-3), "0 or more"),
    ("repeat a half", lambda cache: cache.batch_repeat_interleave(1.5), "Give a number of copies"),
    ("repeat fewer than none", lambda cache: cache.batch_repeat_interleave(-1), "0 or more"),
    ("repeat each as it likes", lambda cache: cache.batch_repeat_interleave(torch.tensor([1, 2])), "number of copies"),
    ("a row too many", lambda cache: cache.reorder_cache(torch.tensor([0, 2])), "with 2 rows .* not all .* are there"),
    ("a row before the first", lambda cache: cache.reorder_cache(torch.tensor([-1, 0])), "from 0 to 1"),
    ("rows in a table", lambda cache: cache.batch_select_indices(torch.tensor([[0, 1]])), "it has 2 dimensions"),
    ("a row, not rows", lambda cache: cache.batch_select_indices(1), "it has 0 dimensions"),
    ("halves of rows", lambda cache: cache.batch_select_indices(torch.tensor([0.5])), "numbers of type torch.float32"),
    ("no rows at all", lambda cache: cache.batch_select_indices(None), "NoneType is no list"),
    ("names of rows", lambda cache: cache.batch_select_indices(["first"]), "list is no list of numbers"),
    ("a short mask", lambda cache: cache.batch_select_indices(torch.tensor([True])), "a mask over 1 rows"),
    ("a long mask", lambda cache: cache.batch_select_indices([True, False, True]), "a mask over 3 rows"),
    ("a window of a text", lambda cache: cache.window("w5 w6"), "ids='w5 w6' is no table"),
    ("a window with a text as mask", lambda cache: cache.window(tokens(20, rows=2), "11"), "mask='11' is no table"),
    ("a window of halves", lambda cache: cache.window(torch.rand(2, 20)), "Give the ids of the whole text"),
    ("join a number", lambda cache: cache.join(3), "join a int"),
]


@pytest.mark.parametrize(("call", "said"), [pytest.param(*case[1:], id=case[0]) for case in REFUSED])
@pytest.mark.parametrize("fed", [8, 20], ids=["while the window fills", "past the window"])
@torch.no_grad()
def test_what_cannot_be_is_refused_and_nothing_has_changed(call, said, fed):
    model = tiny("llama", layers=1)
    cache, twin = (SinkCache(12, 3, model=model) for _ in range(2))
    for one in (cache, twin):
        model(tokens(fed, rows=2), **{cache_name(model): one})
    with pytest.raises(SinkArgumentError, match=said):
        call(cache)
    assert cache.is_croppable is False
    found, wanted = (model(tokens(1, rows=2, seed=3), **{cache_name(model): one}).logits for one in (cache, twin))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    "rows", [[1, 0], (1, 0), torch.tensor([1, 0], dtype=torch.int8), [False, True], range(1, -1, -1)]
)
@torch.no_grad()
def test_rows_may_be_given_in_any_form_of_a_list(rows):
    model = tiny("llama", layers=1)
    cache, twin = (SinkCache(12, 3, model=model) for _ in range(2))
    for one in (cache, twin):
        model(tokens(20, rows=2), **{cache_name(model): one})
    cache.batch_select_indices(rows)
    wanted = [1] if list(rows) == [False, True] else [1, 0]
    new = tokens(1, rows=2, seed=3)
    found = model(new[wanted], **{cache_name(model): cache}).logits
    assert torch.allclose(found, model(new, **{cache_name(model): twin}).logits[wanted], atol=1e-5)


@pytest.mark.parametrize("none", [[], torch.tensor([]), torch.tensor([False, False])])
@torch.no_grad()
def test_no_rows_are_a_reset(none):
    model = tiny("llama", layers=1)
    cache = SinkCache(12, 3, model=model)
    model(tokens(20, rows=2), **{cache_name(model): cache})
    cache.batch_select_indices(none)
    assert (cache.get_seq_length(), cache.is_initialized) == (0, False)
