"""A cache knows what its rows have read, whatever is done to it; compared with plain lists of the same tokens."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sink_patch import SinkCache
from sink_patch.cache import unpacking
from sink_patch.history import record, rows
from sink_patch.streaming.bound import streams_of
from tests.support.saved import FORMAT_1, steady_model
from tests.support.tiny import tiny, tokens

W, S = 12, 3
SMALL = {"BLOCK": 8, "_MOST_MARKS": 4}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """So that much is hashed and forgotten."""
    for name, value in SMALL.items():
        monkeypatch.setattr(rows, name, value)
    monkeypatch.setattr(unpacking, "BLOCK", SMALL["BLOCK"])
    monkeypatch.setattr(record, "KEPT", 10)
    monkeypatch.setattr(record, "_MOST_WAITING", 20)


def llama():
    return tiny("llama", max_position_embeddings=48)


class Walk:
    """A cache, and what its rows have read."""

    def __init__(self, seed: int, path):
        self.random, self.path = random.Random(seed), path
        self.model, self.fed = llama(), 0
        self.cache, self.read = SinkCache(W, S, model=self.model), [[], []]
        self.cache.activate_past_recording(4)

    def feed(self):
        self._feed(self.random.choice([1, 1, 1, 2, 3, W + 5]))

    def _feed(self, columns: int, *, padded: bool = False):
        self.fed += 1
        ids = tokens(columns, rows=len(self.read), seed=self.fed)
        new = [self.random.randint(0, columns) if padded else columns for _ in self.read]
        new[0] = columns
        mask = torch.tensor([[0] * (columns - count) + [1] * count for count in new])
        with torch.no_grad():
            self.model(ids, past_key_values=self.cache, **({"attention_mask": mask} if padded else {}))
        for row, one, count in zip(self.read, ids.tolist(), new, strict=True):
            row.extend(one[columns - count :])

    def feed_padded(self):
        self._feed(self.random.randint(2, 6), padded=True)

    def fail(self):
        handle = self.model.model.layers[0].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            self.model(tokens(3, rows=len(self.read)), past_key_values=self.cache)
        handle.remove()

    def crop(self):
        count = self.random.randint(0, 4)
        if min(map(len, self.read)) > count and streams_of(self.cache).crop(count):
            self.read = [row[: len(row) - count] for row in self.read]

    def take_back(self):
        counts = [self.random.randint(0, 3) for _ in self.read]
        if streams_of(self.cache).take_back(counts) is None and all(self.read):
            self.read = [row[: len(row) - count] for row, count in zip(self.read, counts, strict=True)]

    def select(self):
        if all(self.read):
            picked = [self.random.randrange(len(self.read)) for _ in range(2)]
            self.cache.reorder_cache(torch.tensor(picked))
            self.read = [list(self.read[row]) for row in picked]

    def select_by_mask(self):
        if all(self.read):
            self.cache.batch_select_indices(torch.tensor([True] * len(self.read)))

    def repeat(self):
        if all(self.read) and len(self.read) < 4:
            self.cache.batch_repeat_interleave(2)
            self.read = [list(row) for row in self.read for _ in range(2)]

    def clone(self):
        before, self.cache = self.cache, self.random.choice([copy.deepcopy, SinkCache.clone])(self.cache)
        with torch.no_grad():
            if all(self.read):
                self.model(tokens(2, rows=len(self.read)), past_key_values=before)  # which is nobody's business

    def save(self):
        self.cache.save(self.path)
        self.cache = SinkCache.load(self.path, model=self.model)

    def reset(self):
        self.cache.reset()
        self.read = [[], []]

    def check(self):
        known = streams_of(self.cache).history.rows
        assert known is not None
        for row, read in zip(known or [rows.RowHistory()] * len(self.read), self.read, strict=True):
            assert row.seen == len(read)
            assert row.difference(read) is None
            assert row.newest.tolist() == read[len(read) - len(row.newest) :]
            assert len(row.newest) <= 48 + SMALL["BLOCK"]


STEPS = ["feed"] * 12 + ["feed_padded", "fail", "crop", "take_back", "select", "select_by_mask", "clone", "save"]


@pytest.mark.parametrize("seed", range(12))
def test_it_knows_what_its_rows_have_read_whatever_is_done(seed, tmp_path):
    walk = Walk(seed, tmp_path / "cache")
    for _ in range(60):
        step = walk.random.choice([*STEPS, *(["repeat", "reset"] if walk.random.random() < 0.1 else [])])
        getattr(walk, step)()
        if walk.random.random() < 0.3:  # else it would be hashed after each step
            walk.check()
    walk.check()


@torch.no_grad()
def test_what_was_fed_as_embeddings_is_not_known_until_a_reset():
    model = llama()
    cache = SinkCache(W, S, model=model)
    model(tokens(5), past_key_values=cache)
    model(inputs_embeds=model.get_input_embeddings()(tokens(2)), past_key_values=cache)
    model(tokens(1), past_key_values=cache)
    assert streams_of(cache).history.rows is None
    assert streams_of(cache.clone()).history.rows is None
    cache.reset()
    model(tokens(5), past_key_values=cache)
    assert [row.seen for row in streams_of(cache).history.rows or ()] == [5]


@torch.no_grad()
def test_a_file_of_before_knows_nothing_until_a_reset(tmp_path):
    model = steady_model()
    cache = SinkCache.load(FORMAT_1, model=model)
    assert streams_of(cache).history.rows is None
    cache.save(tmp_path / "again")
    cache = SinkCache.load(tmp_path / "again", model=model)
    assert streams_of(cache).history.rows is None
    cache.reset()
    assert streams_of(cache).history.rows == []


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: numbers that leave it, and copies to the host."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += str(func) in ("aten._local_scalar_dense.default", "aten.is_nonzero.default")
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_no_step_asks_for_a_number_on_the_device():
    """Beams change their rows after each token, by indices on the device."""
    model = llama()
    cache = SinkCache(W, S, model=model)
    model(tokens(5, rows=3), past_key_values=cache)
    order, token = torch.tensor([2, 0, 0]), tokens(1, rows=3)
    with Waits() as waits:
        for _ in range(14):
            model(token, past_key_values=cache)
            cache.reorder_cache(order)
    assert waits.count == 0
    assert streams_of(cache).history.rows
    with Waits() as waits:  # it does count
        assert torch.ones(()).item() == 1
    assert waits.count == 1


@pytest.mark.parametrize("sizes", [{}, {"evict": "turns", "turn_start": [7]}], ids=["tokens", "turns"])
def test_another_default_device_changes_nothing(sizes):
    model, text = tiny("llama"), tokens(600)
    cache = SinkCache(W, S, model=model, **sizes)
    with torch.no_grad():
        model(text[:, :30], past_key_values=cache)
        with torch.device("meta"):  # of neither the model nor the ids
            for token in text[:, 30:].split(1, dim=1):
                model(token, past_key_values=cache)
            (row,) = streams_of(cache).history.rows
    assert row.difference(text[0].tolist()) is None
    assert row.seen == 600
