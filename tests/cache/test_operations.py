"""Each operation of a cache, over all families: the text goes on as in caches of the single rows, fed with the same."""

from __future__ import annotations

import copy

import pytest
import torch

from sink_patch import CacheStateError, SinkCache
from sink_patch.streaming.bound import streams_of
from tests.support.exact import EXACT, built, forward
from tests.support.oracle import relative_error
from tests.support.tiny import tokens

W, S = 12, 3
ROWS = 2
STEPS = (7, *[1] * 8)  # past the window; several tokens at once only at the start, which all families take
AFTER = 5
TOLERANCE = 1e-4  # of states, which a batch computes in another order; 1e-6 without them
STREAM, AFTERWARDS = tokens(sum(STEPS), rows=ROWS), tokens(AFTER, seed=7)


def join(cache, model, path):
    """The rows part, and come together again the other way round."""
    other = cache.clone()
    other.batch_select_indices(torch.tensor([True, False]))
    cache.batch_select_indices(torch.tensor([False, True]))
    cache.join(other)
    return cache, [1, 0]


def clone(cache, model, path):
    return cache.clone(), [0, 1]


def deepcopy(cache, model, path):
    return copy.deepcopy(cache), [0, 1]


def save(cache, model, path):
    cache.save(path)
    return SinkCache.load(path, model=model), [0, 1]


def repeat(cache, model, path):
    cache.batch_repeat_interleave(2)
    return cache, [0, 0, 1, 1]


def select(cache, model, path):
    cache.batch_select_indices(torch.tensor([1]))
    return cache, [1]


def reorder(cache, model, path):
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    return cache, [1, 1, 0]


def reset(cache, model, path):
    cache.reset()
    feed(model, cache, STREAM)
    return cache, [0, 1]


def reset_in_another_batch(cache, model, path):
    cache.reset()
    feed(model, cache, STREAM[[1, 0, 1]])
    return cache, [1, 0, 1]


def crop(cache, model, path):
    """Taken back, where the cache can: states cannot be."""
    if streams_of(cache).facts.has_states:
        with pytest.raises(CacheStateError, match="recurrent states"):
            cache.activate_past_recording()
        return cache, [0, 1]
    cache.activate_past_recording()
    forward(model, cache, tokens(1, rows=ROWS, seed=3))
    cache.crop(-1)
    cache.deactivate_past_recording()
    return cache, [0, 1]


OPERATIONS = (join, clone, deepcopy, save, repeat, select, reorder, reset, reset_in_another_batch, crop)


def feed(model, cache, stream):
    for new in stream.split(STEPS, dim=1):
        forward(model, cache, new)


def continued(model, cache, rows):
    """Logits of the tokens that follow, [tokens, rows, vocab]: in each row the same."""
    return torch.stack([forward(model, cache, token.expand(rows, 1)) for token in AFTERWARDS.T[:, None]])


@pytest.mark.parametrize("model_type", EXACT)
@torch.no_grad()
def test_rows_go_on_after_each_operation(model_type, tmp_path):
    model = built(model_type)
    alone = [SinkCache(W, S, model=model) for _ in range(ROWS)]
    for cache, row in zip(alone, STREAM.split(1), strict=True):
        feed(model, cache, row)
    wanted = [continued(model, cache, 1) for cache in alone]
    first = SinkCache(W, S, model=model)
    feed(model, first, STREAM)
    for operation in OPERATIONS:
        cache, rows = operation(first.clone(), model, tmp_path / f"{operation.__name__}.safetensors")
        found = continued(model, cache, len(rows))
        assert cache.batch_size == len(rows), operation.__name__
        for index, row in enumerate(rows):
            assert relative_error(found[:, index], wanted[row][:, 0]) < TOLERANCE, (operation.__name__, index)
    assert first.get_seq_length() == STREAM.shape[1]
    assert relative_error(continued(model, first, ROWS)[:, 1], wanted[1][:, 0]) < TOLERANCE  # its copies took nothing


def test_no_operation_is_left_out():
    """Each public method of ours is walked above, or takes no text away and adds none."""
    walked = {
        "clone",
        "join",
        "save",
        "load",
        "batch_repeat_interleave",
        "batch_select_indices",
        "reorder_cache",
        "reset",
        "crop",
    }
    recording = {"activate_past_recording", "deactivate_past_recording"}
    of_a_forward = {"update", "update_indexer", "get_mask_sizes", "get_query_offset", "get_seq_length"}
    readings = {"bind", "is_bound_to", "check", "get_max_length", "get_max_cache_shape", "window"}
    ours = [kind for kind in SinkCache.__mro__ if kind.__module__.startswith("sink_patch")]
    methods = {
        name for kind in ours for name, held in vars(kind).items() if callable(held) or hasattr(held, "__func__")
    }
    assert {
        name for name in methods if not name.startswith("_")
    } - walked - recording - of_a_forward - readings == set()
