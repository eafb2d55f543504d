"""`SinkCache` as a cache object: its properties, batch operations, forwards that fail."""

from __future__ import annotations

import copy
import gc
import inspect
import weakref

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

import sink_patch
from sink_patch import SinkCache
from tests.support.caches import default_cache
from tests.support.oracle import relative_error, worst_error
from tests.support.tiny import tiny, tokens

W, S = 12, 3


@pytest.fixture(params=["eager", "sdpa"])
def model(request):
    return tiny("llama", layers=1, attention=request.param)


@torch.no_grad()
def feed(model, cache, ids, **kwargs):
    return model(ids, past_key_values=cache, **kwargs).logits[:, -1]


def test_repr_and_properties(model):
    assert repr(SinkCache(W, S)) == "SinkCache(window_length=12, num_sink_tokens=3, unbound, seen=0)"
    cache = SinkCache(W, S, model=model)
    feed(model, cache, tokens(30))
    assert repr(cache) == "SinkCache(window_length=12, num_sink_tokens=3, model=LlamaForCausalLM, layers=1, seen=30)"
    assert isinstance(cache, Cache)
    assert (len(cache), cache.get_seq_length(), cache.get_max_length(), cache.batch_size) == (1, 30, W, 1)
    assert (cache.is_compileable, cache.is_croppable, cache.is_initialized, cache.is_sliding) == (
        False,
        False,
        True,
        [False],
    )
    if hasattr(Cache, "get_max_cache_shape"):  # it asks the layers; in later versions it calls `get_max_length`
        assert cache.get_max_cache_shape() in (None, -1, W)
    assert SinkCache().window_length == 256
    assert SinkCache().num_sink_tokens == 4


def test_memory_is_bounded_by_the_window(model):
    cache = SinkCache(W, S, model=model)
    feed(model, cache, tokens(5))
    assert cache.layers[0].keys.shape[2] <= W
    for _ in range(3):
        feed(model, cache, tokens(40))
    assert cache.layers[0].keys.shape[2] == cache.layers[0].values.shape[2] == W


def test_a_decode_step_writes_in_place(model):
    cache = SinkCache(W, S, model=model)
    feed(model, cache, tokens(30))
    for token in tokens(2).T:
        feed(model, cache, token[None])  # from then on the keys stay at one address (buffers/sinks)
    address = cache.layers[0].keys.data_ptr()
    for token in tokens(40).T:
        feed(model, cache, token[None])
    assert cache.layers[0].keys.data_ptr() == address


def test_a_cache_can_be_used_again_after_reset(model):
    cache = SinkCache(W, S, model=model)
    first = feed(model, cache, tokens(30))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(feed(model, cache, tokens(30)), first)
    cache.reset()
    feed(model, cache, tokens(4, rows=3))  # another batch size also works after a reset


def test_rows_can_be_reordered_repeated_and_selected(model):
    stream = tokens(40, rows=3)
    cache = SinkCache(W, S, model=model)
    feed(model, cache, stream[:, :30])
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    expected = [feed(model, _alone(model, row[:30]), row[None, 30:31]) for row in stream]
    found = feed(model, cache, stream[[2, 0, 0], 30:31])
    assert relative_error(found, torch.cat([expected[2], expected[0], expected[0]])) < 1e-5
    cache.batch_select_indices(torch.tensor([True, True, False]))
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 4
    following = stream[[2, 2, 0, 0], 31:32]
    alone = torch.cat(
        [feed(model, _alone(model, stream[row, :31]), stream[row : row + 1, 31:32]) for row in (2, 2, 0, 0)]
    )
    assert relative_error(feed(model, cache, following), alone) < 1e-5


def _alone(model, row):
    cache = SinkCache(W, S, model=model)
    feed(model, cache, row[None, :20])
    for start in range(20, len(row)):
        feed(model, cache, row[None, start : start + 1])
    return cache


def test_old_keys_are_freed_at_once(model):
    """And not only at the next forward: a user may reset a cache to free its memory."""
    for drop_keys in (
        lambda cache: cache.reset(),
        lambda cache: cache.batch_select_indices(torch.tensor([0])),
        lambda cache: cache.activate_past_recording(4),
    ):
        cache = SinkCache(W, S, model=model)
        for _ in range(2):
            feed(model, cache, tokens(20, rows=2))
        reference = weakref.ref(cache.layers[0].keys)
        drop_keys(cache)
        gc.collect()
        assert reference() is None


def test_rows_selected_in_inference_mode_can_be_used_outside_it(model):
    cache, stream = SinkCache(W, S, model=model), tokens(40, rows=2)
    with torch.inference_mode():
        feed(model, cache, stream[:, :30])
        cache.reorder_cache(torch.tensor([1, 0]))
    expected = torch.cat([feed(model, _alone(model, row[:30]), row[None, 30:31]) for row in stream.flip(0)])
    assert relative_error(feed(model, cache, stream.flip(0)[:, 30:31]), expected) < 1e-5


def test_crop_removes_tokens_while_nothing_was_overwritten(model):
    stream = tokens(30)
    cache = SinkCache(W, S, model=model)
    feed(model, cache, stream[:, :9])
    cache.crop(-4)
    assert cache.get_seq_length() == 5
    assert worst_error(model, stream, [5], W, S, cache=SinkCache(W, S, model=model)) < 1e-5
    found = feed(model, cache, stream[:, 5:6])
    assert relative_error(found, model(stream[:, :6]).logits[:, -1].detach()) < 1e-5
    feed(model, cache, stream[:, 6:20])
    with pytest.raises(sink_patch.CacheStateError, match="cannot be cropped by .*=-2"):
        cache.crop(-2)
    with pytest.raises(sink_patch.CacheStateError, match="cannot be cropped by .*=5"):
        cache.crop(5)
    assert cache.get_seq_length() == 20


def test_crop_has_the_meaning_of_the_installed_transformers(model):
    """Up to 5.14, a positive number is the new length."""
    takes_lengths = "max_length" in inspect.signature(DynamicCache.crop).parameters
    stream, cache = tokens(9), SinkCache(W, S, model=model)
    feed(model, cache, stream)
    if takes_lengths:
        cache.crop(12)
        assert cache.get_seq_length() == 9
        cache.crop(5)
        assert cache.get_seq_length() == 5
        assert relative_error(feed(model, cache, stream[:, 5:6]), model(stream[:, :6]).logits[:, -1].detach()) < 1e-5
    else:
        cache.crop(0)
        assert cache.get_seq_length() == 9
        with pytest.raises(sink_patch.CacheStateError, match="takes newest tokens back"):
            cache.crop(5)


def test_a_copy_is_right_if_deep_copies_of_views_are_not_views(model, monkeypatch):
    """On Apple's MPS, a deep copy of a view is not a view (torch/_tensor.py, `__deepcopy__`)."""
    cache = SinkCache(W, S, model=model)
    feed(model, cache, tokens(30))
    for token in tokens(5).T:
        feed(model, cache, token[None])
    with monkeypatch.context() as patch:
        patch.setattr(
            torch.Tensor, "__deepcopy__", lambda tensor, memo: memo.setdefault(id(tensor), tensor.detach().clone())
        )
        copied = cache.clone()
    for token in tokens(20, seed=1).T:
        assert torch.equal(feed(model, copied, token[None]), feed(model, cache, token[None]))


def test_a_mask_for_a_layer_that_the_cache_does_not_have_is_that_of_the_first_with_attention(model):
    """Models that share their layers' keys may ask for it."""
    cache, found = SinkCache(W, S, model=model), []
    mask_sizes = lambda *_: found.extend(cache._mask_sizes(1, index) for index in (0, 1, 2, 50, -1))  # noqa: E731
    feed(model, cache, tokens(2 * W))
    with model.model.layers[0].register_forward_hook(mask_sizes):
        feed(model, cache, tokens(1))
    assert found == [(W, 0)] * 5


def test_is_sliding_describes_the_bound_model():
    cache = SinkCache(W, S, model=tiny("mistral", sliding_window=7))
    assert cache.is_sliding == [True]
    cache.reset()
    cache.bind(tiny("llama", layers=2))
    assert cache.is_sliding == [False, False]


def test_a_copy_is_independent(model):
    stream = tokens(60)
    cache = SinkCache(W, S, model=model)
    feed(model, cache, stream[:, :30])
    copied = copy.deepcopy(cache)
    first = feed(model, cache, stream[:, 30:31])
    feed(model, cache, stream[:, 40:45])
    assert torch.equal(feed(model, copied, stream[:, 30:31]), first)


class Interrupted(RuntimeError):
    pass


def _fail_once(model, layer=-1, kind=Interrupted):
    """Make the next forward fail in the MLP of a layer, after its attention has stored its keys."""

    def fail(*_):
        handle.remove()
        raise kind("out of memory, say")

    handle = model.model.layers[layer].mlp.register_forward_pre_hook(fail)


@pytest.mark.parametrize("kind", [Interrupted, KeyboardInterrupt])
def test_a_forward_that_fails_before_anything_is_overwritten_may_be_repeated(kind):
    model, stream = tiny("llama", layers=2), tokens(20)
    wanted = feed(model, SinkCache(W, S, model=model), stream[:, :11])
    cache = SinkCache(W, S, model=model)
    feed(model, cache, stream[:, :6])
    _fail_once(model, kind=kind)
    with pytest.raises(kind):
        feed(model, cache, stream[:, 6:11])
    assert cache.get_seq_length() == 6
    assert relative_error(feed(model, cache, stream[:, 6:11]), wanted) < 1e-5


@pytest.mark.parametrize("kind", [Interrupted, KeyboardInterrupt])
def test_a_forward_that_fails_after_tokens_were_overwritten_makes_the_cache_unusable_until_reset(kind):
    model, stream = tiny("llama", layers=2), tokens(40)
    cache = SinkCache(W, S, model=model)
    feed(model, cache, stream[:, :20])
    _fail_once(model, kind=kind)
    with pytest.raises(kind):
        feed(model, cache, stream[:, 20:24])
    for _ in range(2):
        with pytest.raises(sink_patch.CacheStateError, match="failed half-way.*reset"):
            feed(model, cache, stream[:, 20:24])
    cache.reset()
    feed(model, cache, stream[:, :20])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_modes_may_change_between_forwards(model, mode):
    stream = tokens(40)
    cache, other = SinkCache(W, S, model=model), SinkCache(W, S, model=model)
    with torch.inference_mode():
        model(stream[:, :8], past_key_values=cache)
    with torch.no_grad():
        model(stream[:, :8], past_key_values=other)
    for start in range(8, 40, 2):
        with mode():
            found = model(stream[:, start : start + 2], past_key_values=cache).logits
        with torch.no_grad():
            wanted = model(stream[:, start : start + 2], past_key_values=other).logits
        assert torch.equal(found, wanted)


def test_a_cache_does_not_keep_its_model_alive():
    model = copy.deepcopy(tiny("llama", layers=1))
    cache = SinkCache(W, S, model=model)
    feed(model, cache, tokens(20))
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
    assert cache.get_seq_length() == 20


def test_a_model_does_not_keep_its_cache_alive():
    model = copy.deepcopy(tiny("llama", layers=1))
    cache = SinkCache(W, S, model=model)
    feed(model, cache, tokens(20))
    reference = weakref.ref(cache)
    del cache
    gc.collect()
    assert reference() is None


def test_a_bound_model_takes_other_caches_as_before():
    plain, bound = copy.deepcopy(tiny("llama", layers=2)), copy.deepcopy(tiny("llama", layers=2))
    SinkCache(W, S, model=bound)
    logits = [feed(model, default_cache(model), tokens(20)) for model in (plain, bound)]
    assert torch.equal(*logits)


def test_the_decoder_may_be_called_and_arguments_may_be_positional(model):
    stream = tokens(30)
    whole, decoder, positional = (SinkCache(W, S, model=model) for _ in range(3))
    for start in range(0, 30, 3):
        ids = stream[:, start : start + 3]
        wanted = feed(model, whole, ids)
        with torch.no_grad():
            hidden = model.model(ids, past_key_values=decoder).last_hidden_state
            other = model(ids, None, None, positional).logits
        assert torch.equal(model.lm_head(hidden)[:, -1], wanted)
        assert torch.equal(other[:, -1], wanted)


def test_positions_and_mask_of_the_whole_stream_may_be_given(model):
    stream = tokens(30)
    plain, given = SinkCache(W, S, model=model), SinkCache(W, S, model=model)
    for start in range(0, 30, 3):
        ids = stream[:, start : start + 3]
        extra = {
            "attention_mask": torch.ones(1, start + 3, dtype=torch.long),
            "position_ids": torch.arange(start, start + 3)[None],
        }
        assert torch.equal(feed(model, given, ids, **extra), feed(model, plain, ids))


@pytest.mark.parametrize("steps", [[20, *[1] * 40], [4, *[1] * 40], [7, 9, 1, 1, 12, 5, 1, 1, 3]])
def test_a_padded_row_equals_the_row_alone(model, steps):
    """Row 1 is seven tokens shorter; both fill and stream, and padding may come in the middle of a stream too."""
    stream, short = tokens(sum(steps), rows=2), 7 if steps[0] > 7 else 3
    together = SinkCache(W, S, model=model)
    alone = [SinkCache(W, S, model=model) for _ in range(2)]
    mask, start = torch.ones(2, sum(steps), dtype=torch.long), 0
    mask[1, : min(short, steps[0] - 1)] = 0
    for number, new in enumerate(steps):
        if number == 1 and new > 1:
            mask[0, start : start + 2] = 0
        stop = start + new
        found = feed(model, together, stream[:, start:stop], attention_mask=mask[:, :stop])
        for row in range(2):
            real = stream[row, start:stop][mask[row, start:stop].bool()][None]
            wanted = feed(model, alone[row], real)
            assert relative_error(found[row], wanted[0]) < 1e-5, (start, row)
        start = stop
