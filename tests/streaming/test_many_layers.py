"""Many layers against a naive sink cache in float64 (tests/support/naive.py), at every forward of long streams."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from sink_patch import SinkCache
from tests.support.naive import NaiveCache, decoder_of
from tests.support.oracle import relative_error
from tests.support.tiny import tiny, tokens

TOLERANCE = 1e-5
SINKS = 4
CONTEXT = 48  # short, so that the clock is set back several times
LOCAL = 9  # sliding window, shorter than the cache's
MIXED = ["sliding_attention", "full_attention"] * 2

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"layers": 3}),
    "gemma3, two thetas": ("gemma3_text", {"layers": 4, "layer_types": MIXED, "sliding_window": LOCAL}),
    "gemma3, local window not shorter than the cache's": (
        "gemma3_text",
        {"layers": 4, "layer_types": MIXED, "sliding_window": 26},
    ),
    "gpt_neox": ("gpt_neox", {"layers": 3}),
    "gptj": ("gptj", {"layers": 3, "n_positions": CONTEXT, "n_ctx": CONTEXT}),
    "cohere2, sliding with RoPE and full without": (
        "cohere2",
        {"layers": 4, "layer_types": MIXED[::-1], "sliding_window": LOCAL},
    ),
    "smollm3, every other layer without RoPE": ("smollm3", {"layers": 4, "no_rope_layers": [1, 0, 1, 0]}),
}
NO_SDPA = {"gptj": "eager"}


def schedule(seed: int, window: int, *, long_prompt: bool) -> list[int]:
    """Ten windows of mostly single tokens, with chunks by rule 3 and by rule 4 among them."""
    rng = random.Random(seed)
    ring = window - SINKS
    steps = [window + 7 if long_prompt else rng.choice([1, 2, window - 3]), ring + 3, ring, 2]
    while sum(steps) < 10 * window:
        chunk = rng.choice([rng.randint(2, ring), rng.randint(ring + 1, window + 5)])
        steps.append(chunk if rng.random() < 0.06 else 1)
    return steps


@contextmanager
def newest_positions(model: PreTrainedModel) -> Iterator[list[int]]:
    """The newest of the `position_ids` of each forward of the decoder."""
    seen: list[int] = []
    hook = decoder_of(model).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(int(kwargs["position_ids"].max())), with_kwargs=True
    )
    try:
        yield seen
    finally:
        hook.remove()


@torch.no_grad()
def worst_error(
    model: PreTrainedModel, window: int, steps: list[int], stream: torch.Tensor, padding: tuple[int, ...]
) -> float:
    """Largest relative error of the logits of any row in any forward; `padding` is to the left of each row."""
    cache = SinkCache(window, SINKS, model=model)
    streams = [row[count:] for row, count in zip(stream, padding, strict=True)]  # each row's own tokens
    naive = [NaiveCache(model, window, SINKS) for _ in streams]
    mask = torch.stack([torch.arange(stream.shape[1]) >= count for count in padding]).long()
    worst, fed = 0.0, 0
    for columns in steps:
        masked = {"attention_mask": mask[:, : fed + columns]} if any(padding) else {}
        found = model(stream[:, fed : fed + columns], past_key_values=cache, **masked).logits.double()
        fed += columns
        for row, (one, its_tokens, count) in enumerate(zip(naive, streams, padding, strict=True)):
            wanted = one.forward(its_tokens[None, one.seen : fed - count])[0]
            worst = max(worst, relative_error(found[row, -wanted.shape[0] :], wanted))
    return worst


@pytest.mark.parametrize(
    ("name", "attention"),
    # both where layers share one mask, and where they have masks of two kinds
    [("llama", "eager"), ("gemma3, two thetas", "eager"), *((name, NO_SDPA.get(name, "sdpa")) for name in MODELS)],
)
def test_every_forward_of_ten_windows_equals_the_naive_cache(name, attention):
    model_type, settings = MODELS[name]
    model = tiny(model_type, max_position_embeddings=CONTEXT, attention=attention, **settings)
    for seed, window in enumerate([16, 24]):
        steps = schedule(seed, window, long_prompt=seed == 1)
        with newest_positions(model) as positions:
            error = worst_error(model, window, steps, tokens(sum(steps), rows=2, seed=seed), padding=(0, 0))
        assert error <= TOLERANCE, (window, error)
        set_back = sum(later < earlier for earlier, later in itertools.pairwise(positions))
        assert set_back >= 3, positions  # else the test does not cover it


@pytest.mark.parametrize("padding", [(0, 5), (11, 2)])
@pytest.mark.parametrize("name", ["llama", "gemma3, two thetas"])
def test_rows_padded_to_the_left_equal_the_naive_cache_of_each_row_alone(name, padding):
    model_type, settings = MODELS[name]
    model = tiny(model_type, max_position_embeddings=CONTEXT, **settings)
    for seed, window in enumerate([16, 24]):
        steps = schedule(seed, window, long_prompt=seed == 1)
        steps[0] = max(steps[0], 13)  # all padding comes with the first forward
        stream = tokens(sum(steps), rows=2, seed=seed)
        assert worst_error(model, window, steps, stream, padding) <= TOLERANCE, window
