"""What a window holds, as the cache tells it, against the windows in plain Python that streams are proven by."""

from __future__ import annotations

import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sink_patch import CacheStateError, HistoryMismatchError, SinkArgumentError, SinkCache
from tests.support.chats import TURN_START, Window, begins, chat
from tests.support.oracle import visible_tokens
from tests.support.tiny import tiny, tokens

W, S = 14, 3
PAD = 0


def llama(context: int = 48):
    return tiny("llama", max_position_embeddings=context)


def turns_cache(window: int = W, sinks: int = S) -> SinkCache:
    return SinkCache(window, sinks, evict="turns", turn_start=TURN_START, model=llama())


def steps(seed: int, length: int, window: int = W) -> list[int]:
    """The first one may be longer than the window, and others longer than the ring."""
    rng = random.Random(seed)
    found = [rng.choice([1, 2, window, window + 5])]
    while sum(found) < length:
        found.append(min(rng.choice([1, 1, 1, 2, window - 1, window + 3]), length - sum(found)))
    return found


def that_stay(visible: list[int], window: int = W, sinks: int = S) -> list[int]:
    """What stays of what a forward saw: where it was more than the window, the sinks and the newest."""
    return visible if len(visible) <= window else [*visible[:sinks], *visible[len(visible) - (window - sinks) :]]


def places(window) -> list[int]:
    return [*window.sinks, *window.recent]


def turns_in(text: list[int], where) -> tuple[int, ...]:
    return tuple(place for place in where if begins(text, place, TURN_START))


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_single_tokens_leave(seed):
    rng = random.Random(seed)
    window = rng.randint(2, 20)
    sinks = rng.randint(0, window - 1)
    cache, seen, text = SinkCache(window, sinks, model=llama()), 0, tokens(5 * window + 9, seed=seed)
    everything = torch.arange(text.shape[1])[None]
    for new in steps(seed, 5 * window, window):
        llama()(text[:, seen : seen + new], past_key_values=cache)
        visible = visible_tokens(everything, seen, new, window, sinks)[0].tolist()
        seen += new
        (found,) = cache.window()
        assert places(found) == that_stay(visible, window, sinks)
        assert (found.sinks.stop, found.recent.stop, found.turns) == (min(seen, sinks), seen, None)
        assert [*found.sinks, *found.left, *found.recent] == list(range(seen))
        assert len(found) == len(places(found))
        assert cache.window(text) == [found]


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_whole_messages_leave(seed):
    cache, text = turns_cache(), chat(seed, 110, longest=7)
    seen_by, seen = Window(text, W, S), 0
    for new in steps(seed, 100):
        llama()(torch.tensor([text[seen : seen + new]]), past_key_values=cache)
        visible = seen_by.visible(seen, new)
        seen += new
        (found,) = cache.window()
        assert places(found) == that_stay(visible)
        assert found.turns == turns_in(text[:seen], found.recent)
        (all_of_it,) = cache.window(torch.tensor([text]))
        assert (all_of_it.sinks, all_of_it.recent) == (found.sinks, found.recent)
        assert all_of_it.turns == turns_in(text[:seen], range(seen))
    assert seen_by.floor > W


def batch(texts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [rows, columns], padded to the left."""
    longest = max(map(len, texts))
    rows = [[PAD] * (longest - len(text)) + text for text in texts]
    mask = [[0] * (longest - len(text)) + [1] * len(text) for text in texts]
    return torch.tensor(rows), torch.tensor(mask)


@torch.no_grad()
@pytest.mark.parametrize("change", ["nothing", "clone", "save", "select", "crop"])
def test_rows_of_different_lengths_whatever_is_done_to_them(change, tmp_path):
    """Each row is as it would be alone; with the mask, its places are columns."""
    texts = [chat(seed, length, longest=6) for seed, length in ((1, 60), (2, 51), (3, 44))]
    cache, (ids, mask) = turns_cache(), batch(texts)
    cache.activate_past_recording(3) if change == "crop" else None
    columns = 20  # the shortest row has 4 tokens by then, the longest 20
    llama()(ids[:, :columns], attention_mask=mask[:, :columns], past_key_values=cache)
    for column in range(columns, ids.shape[1]):
        llama()(ids[:, column : column + 1], attention_mask=mask[:, : column + 1], past_key_values=cache)
    alone = []
    for text in texts:
        window, first = Window(text, W, S, margin=3 if change == "crop" else 0), len(text) - ids.shape[1] + columns
        visible = window.visible(0, first)
        for seen in range(first, len(text)):
            visible = window.visible(seen, 1)
        alone.append(that_stay(visible))
    if change == "clone":
        cache = cache.clone()
    elif change == "save":
        cache.save(tmp_path / "cache")
        cache = SinkCache.load(tmp_path / "cache", model=llama())
    elif change == "select":
        cache.batch_select_indices(torch.tensor([2, 0]))
        texts, alone, ids, mask = [texts[2], texts[0]], [alone[2], alone[0]], ids[[2, 0]], mask[[2, 0]]
    elif change == "crop":  # what had left for single tokens comes back, and messages do not
        cache.crop(-2)
        texts = [text[:-2] for text in texts]
        ids, mask = ids[:, :-2], mask[:, :-2]
        alone = [[*stay[:S], *range(max(S, stay[S] - (2 if len(stay) == W else 0)), stay[-1] - 1)] for stay in alone]
    found, in_columns = cache.window(), cache.window(ids, mask)
    for window, columned, text, row, real, stay in zip(found, in_columns, texts, ids, mask, alone, strict=True):
        if change != "crop" or begins(text, stay[S], TURN_START):
            assert places(window) == stay
        assert window.turns == turns_in(text, window.recent)
        assert row[places(columned)].tolist() == [text[place] for place in places(window)]
        padding = int((real == 0).sum())
        assert columned.turns == tuple(place + padding for place in turns_in(text, range(len(text))))


@torch.no_grad()
def test_tokens_that_are_taken_back_bring_others_back():
    cache, text = SinkCache(W, S, model=llama()), tokens(40)
    cache.activate_past_recording(4)
    llama()(text[:, :30], past_key_values=cache)
    for column in range(30, 40):
        llama()(text[:, column : column + 1], past_key_values=cache)
    cache.crop(-4)
    assert places(cache.window()[0]) == [0, 1, 2, *range(36 - (W - S), 36)]


@torch.no_grad()
def test_padding_behind_a_row_that_has_ended_lies_inside_a_range():
    cache = SinkCache(8, 2, model=llama())
    ids = torch.tensor([[5, 6, 7, PAD, PAD, 8, 9], [15, 16, 17, 18, 19, 20, 21]])
    mask = torch.tensor([[1, 1, 1, 0, 0, 1, 1], [1] * 7])
    first = torch.tensor([[PAD, PAD, 5, 6, 7], ids[1, :5].tolist()])
    llama()(first, attention_mask=mask[:, [3, 4, 0, 1, 2]], past_key_values=cache)
    llama()(ids[:, 5:], past_key_values=cache)
    first, second = cache.window(ids, mask)
    assert (first.sinks, first.recent) == (range(2), range(2, 7))
    assert (second.sinks, second.recent) == (range(2), range(2, 7))


class Ops(TorchDispatchMode):
    """Counts what is asked of torch."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_it_is_told_without_a_word_with_the_device():
    """Where messages begin is told from ids, which come to the host once."""
    plain, turns = SinkCache(W, S, model=llama()), turns_cache()
    for cache in (plain, turns):
        llama()(tokens(30), past_key_values=cache)
    counts = []
    for cache in (plain, turns, turns):
        with Ops() as ops:
            cache.window()
        counts.append(ops.count)
    assert (counts[0], counts[2]) == (0, 0)
    assert counts[1] > 0


def test_nothing_read_is_no_row():
    assert SinkCache(W, S).window() == SinkCache(W, S, model=llama()).window(tokens(3)) == []


@torch.no_grad()
def test_what_was_fed_as_embeddings_has_no_turns_that_are_known():
    cache = SinkCache(W, S, turn_start=TURN_START, model=llama())
    llama()(inputs_embeds=llama().get_input_embeddings()(tokens(20)), past_key_values=cache)
    (found,) = cache.window()
    assert (places(found), found.turns) == ([0, 1, 2, *range(20 - (W - S), 20)], None)


@torch.no_grad()
@pytest.mark.parametrize(
    ("ids", "mask", "error", "said"),
    [
        (tokens(20, seed=1), None, HistoryMismatchError, "from token 0 on"),
        (tokens(19), None, SinkArgumentError, "has 19 tokens, and the SinkCache has read 20"),
        (tokens(20, rows=2), None, SinkArgumentError, "has 1 rows"),
        (tokens(20)[0], None, SinkArgumentError, r"shape \[20\]"),
        (tokens(20), torch.ones(1, 19), SinkArgumentError, r"a mask of \[1, 19\]"),
        (None, torch.ones(1, 20), SinkArgumentError, "without ids"),
    ],
)
def test_another_text_is_refused(ids, mask, error, said):
    cache = SinkCache(W, S, model=llama())
    llama()(tokens(20), past_key_values=cache)
    with pytest.raises(error, match=said):
        cache.window(ids, mask)


@torch.no_grad()
def test_it_is_not_told_in_the_middle_of_a_forward():
    cache, model = SinkCache(W, S, model=llama()), llama()
    hook = model.model.layers[0].register_forward_pre_hook(lambda *_: print(cache.window()))
    try:
        with pytest.raises(CacheStateError, match="asked what it holds"):
            model(tokens(5), past_key_values=cache)
    finally:
        hook.remove()
