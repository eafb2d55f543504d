"""Another default device than that of the model and the ids (`torch.set_default_device`) changes nothing.

"meta" stands for a GPU: what is made there by mistake holds no numbers, and does not go together with tensors of a CPU.
"""

from __future__ import annotations

import ast
import functools
from typing import Any

import pytest
import torch

from sink_patch import SinkCache
from sink_patch.streaming.bound import streams_of
from tests.rooms import files
from tests.support import zoo
from tests.support.replay import cache_name
from tests.support.tiny import tokens

W, S = 12, 3
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7, "num_hidden_layers": 2}


def mask_of(*lengths: int) -> torch.Tensor:
    columns = max(lengths)
    return torch.tensor([[0] * (columns - length) + [1] * length for length in lengths])


def feed(model: Any, cache: SinkCache, ids: torch.Tensor, **others: Any) -> torch.Tensor:
    return model(ids, **{cache_name(model): cache}, **others).logits[:, -1]


def singles(model: Any, cache: SinkCache, ids: torch.Tensor) -> list[torch.Tensor]:
    return [feed(model, cache, token) for token in ids.split(1, dim=1)]


def a_row(model, text, mask, path):
    cache = SinkCache(W, S, model=model)
    return [feed(model, cache, text[:1, :5]), *singles(model, cache, text[:1])]


def ragged_rows(model, text, mask, path):
    cache = SinkCache(W, S, model=model)
    return [feed(model, cache, text[:, :9], attention_mask=mask), *singles(model, cache, text)]


def other_rows(model, text, mask, path):
    cache = SinkCache(W, S, model=model)
    found = [feed(model, cache, text[:, :9], attention_mask=mask)]
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(text.new_tensor([3, 0, 1, 2]))
    found += singles(model, cache, text.repeat(2, 1)[:, :20])
    cache.batch_select_indices(text.new_tensor([0, 2]))
    other = SinkCache(W, S, model=model)
    feed(model, other, text[:1, :30])
    cache.join(other)
    return [*found, *singles(model, cache, text[:1].repeat(3, 1))]


def taken_back(model, text, mask, path):
    cache = SinkCache(W, S, model=model)
    cache.activate_past_recording(4)
    found = [feed(model, cache, text[:, :9], attention_mask=mask), feed(model, cache, text[:, :5])]
    cache.crop(-3)
    return [*found, *singles(model, cache, text)]


def messages(model, text, mask, path):
    cache = SinkCache(W, S, evict="turns", turn_start=[7], model=model)
    text = text.where(text.new_tensor(range(text.shape[1])) % 5 > 0, 7)
    return [feed(model, cache, text[:, :9], attention_mask=mask), *singles(model, cache, text)]


def own_positions(model, text, mask, path):
    cache = SinkCache(W, S, model=model)
    position_ids = text.new_tensor([list(range(9)), [0, 0, 0, *range(6)]])
    found = [feed(model, cache, text[:, :9], attention_mask=mask, position_ids=position_ids)]
    return [*found, feed(model, cache, text[:, :1], position_ids=text.new_tensor([[9], [6]]))]


def fixed(model, text, mask, path):
    """The steps of compiled decoding, without a compiler."""
    cache = SinkCache(W, S, model=model)
    found, streams = [feed(model, cache, text[:, :9], attention_mask=mask)], streams_of(cache)
    for token in text.split(1, dim=1):
        read = functools.partial(feed, model, cache, token)
        found.append(streams.run_outside(model, token, None, lambda given, read=read: read(**given)))
    return found


def looked_at_and_saved(model, text, mask, path):
    cache = SinkCache(W, S, model=model)
    found = [feed(model, cache, text[:, :9], attention_mask=mask), *singles(model, cache, text[:, :20])]
    cache.window()
    whole = torch.cat((mask, mask.new_ones(2, 20)), dim=1)
    cache.window(torch.cat((text[:, :9], text[:, :20]), dim=1).tolist(), whole)
    cache.save(path)
    loaded = SinkCache.load(path, model=model)
    return [*found, *singles(model, loaded.clone(), text[:, 20:])]


def generated(model, text, mask, path):
    """A call, and a later turn."""
    asked: dict[str, Any] = {"cache_implementation": "sink", "window_length": W, "num_sink_tokens": S}
    first = model.generate(text[:, :9], attention_mask=mask, max_new_tokens=20, do_sample=False, **asked)
    cache = SinkCache(W, S, model=model)
    turn = model.generate(text[:, :9], attention_mask=mask, max_new_tokens=9, do_sample=False, past_key_values=cache)
    later = torch.cat((turn, text[:, :3]), dim=1)
    seen = torch.cat((mask, mask.new_ones(2, later.shape[1] - 9)), dim=1)
    second = model.generate(later, attention_mask=seen, max_new_tokens=9, do_sample=False, past_key_values=cache)
    return [first, second]


def kept_streams(model, text, mask, path):
    kept: dict[str, Any] = {"cache_implementation": "sink", "window_length": W, "num_sink_tokens": S, "keep_streams": 2}
    kept |= {"do_sample": False, "max_new_tokens": 9}
    first = model.generate(text[:1, :9], **kept)
    second = model.generate(torch.cat((first, text[:1, :3]), dim=1), **kept)
    return [first, second]


USES = [
    a_row,
    ragged_rows,
    other_rows,
    taken_back,
    messages,
    own_positions,
    fixed,
    looked_at_and_saved,
    generated,
    kept_streams,
]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
@torch.no_grad()
def test_what_a_cache_does_is_the_same(use, name, tmp_path):
    found = []
    for device in ("cpu", "meta"):
        try:  # a model of its own, as adapters are proven once
            model = zoo.build(name, max_position_embeddings=40, **(SLIDING if name == "gemma3_text" else {}))
        except zoo.CannotBuild as failure:
            pytest.skip(str(failure))
        if name == "gemma3_text":  # the sliding windows of transformers' own cache, which the probe uses, fail there
            one_by_one = streams_of(SinkCache(W, S, model=model)).facts.one_by_one
            if one_by_one is not None and use in (taken_back, generated):
                pytest.skip(one_by_one.reason)
        text, mask = tokens(40, 2), mask_of(9, 6)
        with torch.device(device):
            found.append(use(model, text, mask, tmp_path / f"{device}.safetensors"))
    for one, other in zip(*found, strict=True):
        assert one.device == other.device == torch.device("cpu")
        assert torch.equal(one, other)


MAKERS = {
    *("tensor", "as_tensor", "arange", "zeros", "ones", "full", "empty", "eye", "linspace", "rand", "randn", "randint")
}
OWN_PROCESS = {"evaluate", "cli"}  # the command line, where nobody else sets a default


def made_anywhere(tree: ast.Module) -> list[int]:
    """Lines with a call of torch that makes a tensor where torch's default says."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    return [
        call.lineno
        for call in calls
        if isinstance(call.func.value, ast.Name)
        and (call.func.value.id, call.func.attr in MAKERS) == ("torch", True)
        and "device" not in [keyword.arg for keyword in call.keywords]
    ]


def test_every_tensor_is_made_on_a_device_that_we_name():
    found = [(file.name, made_anywhere(file.tree)) for file in files() if file.room not in OWN_PROCESS]
    assert len(found) > 100
    assert [(name, lines) for name, lines in found if lines] == []
    assert made_anywhere(ast.parse("torch.arange(3)\ntorch.arange(3, device=there)")) == [1]
