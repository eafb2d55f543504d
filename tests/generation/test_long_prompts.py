"""A prompt of fifty windows takes no more memory than one of two, because it is fed in pieces."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sink_patch import SinkCache
from tests.support.tiny import tiny, tokens

W, S = 16, 4
WINDOWS = 50
PROMPT = tokens(WINDOWS * W)
SINK = {"cache_implementation": "sink", "window_length": W, "num_sink_tokens": S}


@pytest.fixture
def seen(monkeypatch) -> list[tuple[int, int, int]]:
    """(columns fed, keys that attention gets, bytes of the cache) at each update of a layer."""
    record: list[tuple[int, int, int]] = []
    update = SinkCache.update

    def recording(cache: SinkCache, key_states: torch.Tensor, *args: Any, **more: Any) -> Any:
        keys, values = update(cache, key_states, *args, **more)
        record.append((key_states.shape[2], keys.shape[2], cache.nbytes))
        return keys, values

    monkeypatch.setattr(SinkCache, "update", recording)
    return record


PIECES = {
    "past the context": (64, {}, W - S),
    "of prefill_chunk_size": (4096, {"prefill_chunk_size": 5}, 5),
    "longer than the ring": (4096, {"prefill_chunk_size": 2 * W}, 2 * W),
}


@pytest.mark.parametrize("given", ["ids", "embeddings"])
@pytest.mark.parametrize(("context", "pieces", "size"), PIECES.values(), ids=PIECES)
def test_memory_stays_bounded_while_a_long_prompt_is_fed(seen, context, pieces, size, given):
    model = tiny("llama", layers=2, attention="sdpa", max_position_embeddings=context)
    embeds = model.get_input_embeddings()(PROMPT).detach()
    prompt = {"input_ids": PROMPT} if given == "ids" else {"inputs_embeds": embeds}
    model.generate(**prompt, do_sample=False, max_new_tokens=W, **pieces, **SINK)
    fed, keys, held = zip(*seen, strict=True)
    assert sum(fed) == 2 * (PROMPT.shape[1] + W - 1)  # all of it, in each of the two layers
    assert max(fed) == size
    assert max(keys) <= max(W, S + size)
    full = 2 * (2 * W + S) * 2 * 16 * 4  # layers, slots of keys, values and pristine sinks, heads, head_dim, float32
    assert max(held) == held[-1] == full


def test_in_one_forward_attention_gets_the_whole_prompt(seen):
    """Without pieces, the tests above would see this. The size of the cache is the same."""
    model = tiny("llama", layers=2, attention="sdpa", max_position_embeddings=4096)
    model.generate(PROMPT, do_sample=False, max_new_tokens=3, **SINK)
    assert max(keys for _, keys, _ in seen) == PROMPT.shape[1]
    assert max(held for *_, held in seen) == 2 * (2 * W + S) * 2 * 16 * 4
