"""Whole messages leave a full window: a forward sees the sinks and all from the floor on, and the floor begins a message."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import sink_patch
from sink_patch import SinkCache
from tests.support.chats import ROLE, TURN_START, Window, chat
from tests.support.naive import NaiveCache
from tests.support.oracle import relative_error
from tests.support.replay import cache_name
from tests.support.tiny import FAMILIES, tiny, tokens, variants

TOLERANCE = 1e-5
CONTEXT = 48  # short, so that the clock is set back in each stream; families with a table of angles keep their own
LOCAL = 7
MIXED = ["sliding_attention", "full_attention"]
CASES = [(model_type, name, config) for model_type in FAMILIES for name, config in variants(model_type)]


def turns_cache(model: PreTrainedModel, window: int, sinks: int) -> SinkCache:
    return SinkCache(window, sinks, evict="turns", turn_start=TURN_START, model=model)


def schedule(seed: int, length: int, window: int, sinks: int, *, one_by_one: bool = False) -> list[int]:
    """A prompt, mostly single tokens, and pieces shorter and longer than the ring."""
    rng = random.Random(seed)
    steps = [rng.choice([1, 3, window, window + rng.randint(1, 9)])]
    while sum(steps) < length:
        some = rng.choice([1, 1, 1, 1, 2, 3, window - sinks, rng.randint(1, window + 5)])
        steps.append(1 if one_by_one else min(some, length - sum(steps)))
    return steps


@torch.no_grad()
def worst_error(
    model: PreTrainedModel, window: Window, steps: list[int], *, local: int | None = None, cache: Any = None
) -> float:
    """Largest relative error of the last logits of any forward, by the one-layer oracle.

    Args:
        window: tells what is seen.
        local: the layer's own sliding window, if it is shorter than the cache's: then it has no sinks.
    """
    cache = cache or turns_cache(model, window.window_length, window.num_sink_tokens)
    worst, seen, text = 0.0, cache.get_seq_length(), torch.tensor([window.text])
    for new in steps:
        found = model(text[:, seen : seen + new], **{cache_name(model): cache}).logits[:, -1]
        visible = window.visible(seen, new)
        seen += new
        if local is not None:
            visible = list(range(max(0, seen - local), seen))
        worst = max(worst, relative_error(found, model(text[:, visible], use_cache=False).logits[:, -1]))
    return worst


@pytest.mark.parametrize(("model_type", "name", "config"), CASES, ids=[f"{case[0]}-{case[1]}" for case in CASES])
def test_each_family_sees_whole_messages_alone(model_type, name, config):
    context = {} if "n_positions" in FAMILIES[model_type] else {"max_position_embeddings": CONTEXT}
    model = tiny(model_type, attention="sdpa" if model_type == "llama" else "eager", **context, **config)
    one_by_one = sink_patch.families()[model_type].whole_prompts  # with the installed transformers
    for seed, (window, sinks, longest) in enumerate([(14, 3, 7), (9, 0, 12)]):
        steps = schedule(seed, 6 * window, window, sinks, one_by_one=one_by_one)
        seen = Window(chat(seed, sum(steps), longest=longest), window, sinks)
        assert worst_error(model, seen, steps, local=LOCAL if "short" in name else None) <= TOLERANCE, window
        assert seen.floor > 0


def test_falcon_with_alibi():
    steps = schedule(3, 80, 14, 3)
    seen = Window(chat(3, sum(steps), longest=7), 14, 3)
    assert worst_error(tiny("falcon", alibi=True), seen, steps) <= TOLERANCE


@pytest.mark.parametrize("model_type", ["llama", "cohere", "mistral"])
def test_no_random_chat_is_a_counterexample(model_type):
    config = {"sliding_window": LOCAL} if model_type == "mistral" else {}
    for seed in range(40):
        rng = random.Random(seed)
        window, context = rng.randint(2, 30), rng.choice([4, 64, 192])
        sinks = rng.randint(0, window - 1)
        model = tiny(model_type, attention="sdpa", max_position_embeddings=context, **config)
        steps = schedule(seed, rng.randint(2, 5) * window, window, sinks)
        seen = Window(chat(seed, sum(steps), longest=rng.choice([1, window // 2, 2 * window])), window, sinks)
        local = LOCAL if model_type == "mistral" and window > LOCAL else None
        assert worst_error(model, seen, steps, local=local) <= TOLERANCE, seed


def test_the_window_never_begins_inside_a_message_that_fits():
    """Messages are no longer than the room beside the sinks and one new token."""
    for seed in range(30):
        window, sinks = 24, 4
        text = chat(seed, 400, longest=window - sinks - 4)
        seen, cache = Window(text, window, sinks), turns_cache(tiny("llama"), window, sinks)
        assert worst_error(tiny("llama"), seen, [5, *[1] * 120], cache=cache) <= TOLERANCE
        assert seen.begins_inside == [], seed
