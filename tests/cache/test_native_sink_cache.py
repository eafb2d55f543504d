"""transformers 4.52 has a `SinkCache` of its own: "sink" means ours, and objects of theirs work as before.

Both run in one process: they are equal where theirs is right, and there is one test for each case where it is wrong and
ours is right (arXiv 2309.17453, section 3.2: positions within the cache). On other versions test_old_sink_cache.py runs
theirs in another process.
"""

from __future__ import annotations

import pytest
import torch
import transformers

import sink_patch
from tests.support.oracle import relative_error, visible_tokens
from tests.support.tiny import tiny, tokens

W, S = 12, 3
pytestmark = pytest.mark.filterwarnings("ignore:.*SinkCache.* is deprecated")


def theirs(window: int = W, sinks: int = S):
    return transformers.SinkCache(window_length=window, num_sink_tokens=sinks)


def llama(**settings):
    return tiny("llama", max_position_embeddings=192, **settings)


@torch.no_grad()
def clamped(model, stream, window=W, sinks=S):
    """Logits [rows, tokens, vocab] of their cache, with positions clamped to W - 1: the only right way to use it."""
    cache, logits = theirs(window, sinks), []
    for index, column in enumerate(stream.split(1, dim=1)):
        position = torch.tensor([min(index, window - 1)])
        positions = {"position_ids": position[None].expand(len(stream), 1), "cache_position": position}
        logits.append(model(column, past_key_values=cache, **positions).logits[:, -1])
    return torch.stack(logits, dim=1)


@torch.no_grad()
def streamed(model, stream, cache):
    return torch.stack([model(column, past_key_values=cache).logits[:, -1] for column in stream.split(1, dim=1)], dim=1)


def fresh(model, stream, seen, new=1, window=W, sinks=S):
    with torch.no_grad():
        return model(visible_tokens(stream, seen, new, window, sinks), use_cache=False).logits[:, -1]


def generated(model, prompt, **more):
    asked = {"max_new_tokens": 30, "do_sample": False, "return_dict_in_generate": True, "output_logits": True, **more}
    return model.generate(prompt, **asked)


def ours(**more):
    return {"cache_implementation": "sink", "window_length": W, "num_sink_tokens": S, **more}


def test_generate_creates_ours_although_theirs_exists():
    assert transformers.SinkCache is not sink_patch.SinkCache
    assert isinstance(generated(llama(), tokens(5), **ours()).past_key_values, sink_patch.SinkCache)


def test_an_object_of_theirs_works_as_before():
    found = generated(llama(), tokens(5), past_key_values=theirs())
    sink_patch.unpatch()
    wanted = generated(llama(), tokens(5), past_key_values=theirs())
    assert type(found.past_key_values) is transformers.SinkCache
    assert torch.equal(found.sequences, wanted.sequences)


@pytest.mark.parametrize("layers", [1, 2])
def test_both_are_equal_where_theirs_is_right(layers):
    model, stream = llama(layers=layers), tokens(10 * W, rows=2)
    found = streamed(model, stream, sink_patch.SinkCache(W, S, model=model))
    wanted, right_again = clamped(model, stream), W + layers * (W - S - 1)
    assert relative_error(found[:, : W - 1], wanted[:, : W - 1]) <= 1e-5
    assert relative_error(found[:, right_again - 1 :], wanted[:, right_again - 1 :]) <= 1e-5


def test_theirs_is_wrong_while_the_window_turns_over_and_ours_is_right():
    model, stream = llama(), tokens(3 * W)
    found, old = streamed(model, stream, sink_patch.SinkCache(W, S, model=model)), clamped(model, stream)
    for index in range(W - 1, W + W - S - 2):
        wanted = fresh(model, stream, index)
        assert relative_error(found[:, index], wanted) <= 1e-5
        assert relative_error(old[:, index], wanted) > 1e-3


def test_theirs_stays_wrong_in_generate_and_ours_is_right():
    model, prompt = llama(), tokens(5)
    for asked, off in ((ours(), False), ({"past_key_values": theirs()}, True)):
        out = generated(model, prompt, **asked)
        errors = [
            relative_error(logits, fresh(model, out.sequences, 4 + step)) for step, logits in enumerate(out.logits)
        ]
        assert (min(errors[W - 5 :]) > 1e-3) is off
        assert (max(errors) <= 1e-5) is not off


def test_after_a_prompt_longer_than_the_window_theirs_is_wrong_and_ours_is_right():
    model, stream = llama(), tokens(22)
    with torch.no_grad():
        cache = sink_patch.SinkCache(W, S, model=model)
        model(stream[:, :20], past_key_values=cache)
        found = model(stream[:, 20:21], past_key_values=cache).logits[:, -1]
        old = theirs()
        model(stream[:, :20], past_key_values=old)
        position = torch.tensor([W - 1])
        found_by_theirs = model(
            stream[:, 20:21], past_key_values=old, position_ids=position[None], cache_position=position
        )
    wanted = fresh(model, stream[:, :21], 20)
    assert relative_error(found, wanted) <= 1e-5
    assert relative_error(found_by_theirs.logits[:, -1], wanted) > 1e-3


def test_a_second_turn_is_wrong_with_theirs_and_right_with_ours():
    model, prompt = llama(), tokens(5)
    first = generated(model, prompt, **ours())
    whole = torch.cat((first.sequences, tokens(4, seed=1)), dim=1)
    fed = first.past_key_values.get_seq_length()
    out = generated(model, whole, past_key_values=first.past_key_values, max_new_tokens=1)
    assert relative_error(out.logits[0], fresh(model, whole, fed, whole.shape[1] - fed)) <= 1e-5
    old = generated(model, prompt, past_key_values=theirs())
    try:
        out = generated(model, whole, past_key_values=old.past_key_values, max_new_tokens=1)
    except (RuntimeError, ValueError, IndexError):
        return
    assert relative_error(out.logits[0], fresh(model, whole, fed, whole.shape[1] - fed)) > 1e-3


def test_more_tokens_than_the_ring_holds_raise_with_theirs_and_are_right_with_ours():
    model, stream = llama(), tokens(26)
    with torch.no_grad():
        cache, old = sink_patch.SinkCache(W, S, model=model), theirs()
        model(stream[:, :16], past_key_values=cache)
        found = model(stream[:, 16:], past_key_values=cache).logits[:, -1]
        model(stream[:, :16], past_key_values=old)
        with pytest.raises(RuntimeError):
            model(stream[:, 16:], past_key_values=old)
    assert relative_error(found, fresh(model, stream, 16, 10)) <= 1e-5


def test_a_padded_row_is_wrong_with_theirs_and_right_with_ours():
    model, prompt, mask = llama(), tokens(9, rows=2), torch.ones(2, 9, dtype=torch.long)
    mask[1, :5] = 0
    padded = {"attention_mask": mask, "pad_token_id": 0, "max_new_tokens": 8}
    for asked, off in ((ours(), False), ({"past_key_values": theirs()}, True)):
        out = generated(model, prompt, **padded, **asked)
        row = out.sequences[1:, 5:-1]  # the tokens that were fed for the last logits, without the padding
        assert (relative_error(out.logits[-1][1:], fresh(model, row, row.shape[1] - 1)) > 1e-3) is off


def test_with_yarn_their_keys_grow_without_limit_and_ours_do_not():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 48, "rope_theta": 1e4}
    model, stream = llama(rope_parameters=yarn), tokens(20 * W)
    cache = sink_patch.SinkCache(W, S, model=model)
    streamed(model, stream, cache)
    old = theirs()
    with torch.no_grad():
        for index, column in enumerate(stream.split(1, dim=1)):
            position = torch.tensor([min(index, W - 1)])
            model(column, past_key_values=old, position_ids=position[None], cache_position=position)
    sizes = cache.layers[0].keys.norm(dim=-1), old.key_cache[0].norm(dim=-1)
    assert sizes[1].max() > 5 * sizes[0].max()
    found = streamed(model, stream, sink_patch.SinkCache(W, S, model=model))[:, -1]
    assert relative_error(found, fresh(model, stream, stream.shape[1] - 1)) <= 1e-5


@torch.no_grad()
def test_in_bfloat16_their_keys_are_rounded_at_each_token_and_ours_are_not():
    window, model, stream = 256, llama(), tokens(600)
    low = type(model)(model.config).eval()
    low.load_state_dict(model.state_dict())
    low.bfloat16()
    cache, old = sink_patch.SinkCache(window, S, model=low), theirs(window)
    for index, column in enumerate(stream.split(1, dim=1)):
        position = torch.tensor([min(index, window - 1)])
        found = low(column, past_key_values=cache).logits[:, -1]
        positions = {"position_ids": position[None], "cache_position": position}
        found_by_theirs = low(column, past_key_values=old, **positions).logits[:, -1]
    visible = visible_tokens(stream, 599, 1, window, S)
    wanted = low(visible, past_key_values=transformers.DynamicCache())
    oldest = wanted.past_key_values.key_cache[0][:, :, S].float()  # theirs rotates it at each token, 252 times
    assert relative_error(old.key_cache[0][:, :, S].float(), oldest) > 0.05
    assert relative_error(found.float(), wanted.logits[:, -1].float()) < 0.02
    assert relative_error(found_by_theirs.float(), wanted.logits[:, -1].float()) > 0.02


@pytest.mark.parametrize("model_type", ["cohere", "helium", "glm", "phi", "nemotron", "gptj"])
def test_families_that_theirs_gets_wrong_or_raises_on_are_right_with_ours(model_type):
    model, stream = tiny(model_type, max_position_embeddings=192), tokens(4 * W)
    found = streamed(model, stream, sink_patch.SinkCache(W, S, model=model))
    wanted = torch.stack([fresh(model, stream[:, : index + 1], index) for index in range(stream.shape[1])], dim=1)
    assert relative_error(found, wanted) <= 1e-5
    try:
        old = clamped(model, stream)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):
        return
    assert relative_error(old[:, -1], wanted[:, -1]) > 1e-3
