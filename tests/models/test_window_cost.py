"""What a window costs, against the storages of all tensors that the layers of a real, filled cache hold."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import sink_patch
from sink_patch import SinkCache
from sink_patch.buffers.rotation import Rotation
from sink_patch.compat import installed_shim
from sink_patch.models.cost.window import Cost, in_words
from sink_patch.streaming.bound import streams_of
from tests.support import zoo
from tests.support.replay import cache_name
from tests.support.tiny import tiny, tokens

W, S = 12, 3


def storages(value: Any, found: dict[int, int], seen: set[int]) -> dict[int, int]:
    """Bytes by address of all storages that hang on a value; not of the frequencies, which all caches share."""
    if id(value) in seen or isinstance(value, (Rotation, type)):
        return found
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    elif isinstance(value, dict):
        for part in (*value.keys(), *value.values()):
            storages(part, found, seen)
    elif isinstance(value, (list, tuple)):
        for part in value:
            storages(part, found, seen)
    elif hasattr(value, "__dict__"):
        storages(vars(value), found, seen)
    return found


def held(model: Any, rows: int, window_length: int = W) -> int:
    """Bytes of a cache that a prompt and single tokens have filled."""
    cache, stream = SinkCache(window_length, S, model=model), tokens(window_length + 8, rows)
    with torch.no_grad():
        for piece in (stream[:, :5], *stream[:, 5:].split(1, dim=1)):
            model(piece, **{cache_name(model): cache})
    return sum(storages(streams_of(cache).store, {}, set()).values())


SLIDING = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 7,
    "num_hidden_layers": 3,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": SLIDING,
    "gpt_oss": SLIDING,  # with sinks of its own
    "smollm3": {"no_rope_layers": [1, 0]},  # no sinks turn where there are no positions
    "deepseek_v3": {},
    "bloom": {},
    "qwen3_next": {},
    "lfm2": {},
    "falcon_h1": {},  # keys and a state in each layer
    "zaya": {},  # the same, with a sliding window
}


def built(model_type: str, **settings: Any) -> Any:
    try:
        model = zoo.build(model_type, **MODELS[model_type], **settings)
    except zoo.CannotBuild as failure:
        pytest.skip(str(failure))
    if (refusal := installed_shim().own_cache(type(model))) is not None:
        pytest.skip(refusal)
    return model


@pytest.mark.filterwarnings("ignore:.position_ids. have no functionality in BLOOM:FutureWarning")
@pytest.mark.parametrize("model_type", MODELS)
def test_it_is_what_a_full_cache_holds(model_type):
    model = built(model_type)
    cost = sink_patch.inspect(model, W, S).cost.window_bytes
    assert [cost, 3 * cost] == [held(model, rows) for rows in (1, 3)]


def test_it_is_in_the_dtype_of_the_model():
    model = copy.deepcopy(tiny("llama", layers=2))
    cost = sink_patch.inspect(model, W, S).cost
    half = sink_patch.inspect(model.to(torch.bfloat16), W, S).cost
    assert (cost.dtype, half.dtype) == ("float32", "bfloat16")
    assert half.token_bytes * 2 == cost.token_bytes
    assert half.window_bytes == held(model, 1)


@pytest.mark.parametrize("window_length", [6, 7, 12])
def test_a_token_more_costs_what_a_longer_window_holds_more(window_length):
    """Where the window is as long as the layers' own, the longer one gives these no sinks: they hold fewer copies."""
    model = built("gemma3_text")
    first, second = (sink_patch.inspect(model, length, S).cost for length in (window_length, window_length + 1))
    copies = 2 * S * 2 * 16 * (4 + 4 + 8 * 4)  # layers, sinks, heads, dims, bytes as made, crossed and turned 8 times
    saved = copies if window_length == 7 else 0
    assert second.window_bytes == first.window_bytes + first.token_bytes - saved
    assert first.token_bytes == (3 if window_length == 6 else 1) * 2 * 2 * 16 * 4  # layers, both, heads, dims, bytes


def test_states_do_not_grow_with_the_window():
    model = built("qwen3_next")
    short, long = (sink_patch.inspect(model, length, S).cost for length in (W, 3 * W))
    assert 0 < short.state_bytes == long.state_bytes < short.window_bytes < long.window_bytes


def test_states_alone():
    model = built("qwen3_next", num_hidden_layers=1, layer_types=["linear_attention"])
    cost = sink_patch.inspect(model, W, S).cost
    assert cost == Cost(W, cost.state_bytes, 0, cost.state_bytes, "float32")
    assert cost.state_bytes == held(model, 1)


def test_nothing_is_allocated_for_it():
    """A window of a terabyte and more."""
    model = tiny("llama", layers=2, max_position_embeddings=2**33)
    cost = sink_patch.inspect(model, 2**32, S).cost
    assert cost.window_bytes > 2**32 * cost.token_bytes > 10**12


def test_programs_read_the_same():
    report = sink_patch.inspect(tiny("llama"), W, S)
    assert report.as_dict()["cost"]["window_bytes"] == report.cost.window_bytes
    assert f"\n  memory   {report.cost}\n" in str(report)


def test_bytes_in_words():
    counts = [0, 999, 1000, 46_080, 11_800_000, 134_217_728, 2 * 10**9]
    assert [in_words(count) for count in counts] == [
        *("0 bytes", "999 bytes", "1.0 kB", "46.1 kB", "11.8 MB", "134 MB", "2.0 GB")
    ]
