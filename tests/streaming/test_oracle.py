"""Every family against the one-layer oracle, over random schedules."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sink_patch
from tests.support.known_gaps import is_newest
from tests.support.oracle import worst_error
from tests.support.tiny import FAMILIES, tiny, tokens, variants

TOLERANCE = 1e-5
WINDOWS = 6  # length of a stream in windows
CONTEXT = 48  # short, so that the clock is set back in each stream; families with a table of angles keep their own
EXAMPLES = 60 if is_newest() else 50  # what random schedules find does not depend on transformers
CASES = [(model_type, name, config) for model_type in FAMILIES for name, config in variants(model_type)]


def schedule(seed: int, window: int, sinks: int) -> list[int]:
    """Single tokens, chunks shorter and longer than the ring, and sometimes a first forward longer than the window."""
    rng, length = random.Random(seed), WINDOWS * window
    steps, total = [rng.choice([1, 3, window, window + rng.randint(1, 9)])], 0
    while True:
        total += steps[-1]
        if total + 1 >= length:
            return steps
        most = length - 1 - total
        steps.append(min(most, rng.choice([1, 1, 1, 1, 2, window - sinks, rng.randint(1, window + 9)])))


@pytest.mark.parametrize("sizes", [[(12, 3), (9, 0), (8, 7)], [(64, 4)]], ids=["short_windows", "long_window"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("model_type", "name", "config"), CASES, ids=[f"{case[0]}-{case[1]}" for case in CASES])
def test_each_family_equals_the_oracle(model_type, name, config, attention, sizes):
    if attention == "sdpa" and not type(tiny(model_type, **config))._supports_sdpa:
        pytest.skip(f"transformers has no sdpa for {model_type}")
    context = {} if "n_positions" in FAMILIES[model_type] else {"max_position_embeddings": CONTEXT}
    model = tiny(model_type, attention=attention, **context, **config)
    for seed, (window, sinks) in enumerate(sizes):
        local = config.get("sliding_window") if "short" in name else None
        steps = schedule(seed, window, sinks)
        if sink_patch.families()[model_type].whole_prompts:  # with the installed transformers
            steps = [steps[0], *[1] * (WINDOWS * window - steps[0])]
        stream = tokens(WINDOWS * window, seed=seed)
        error = worst_error(model, stream, steps, window, sinks, local_window=local)
        assert error <= TOLERANCE, (window, sinks)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_falcon_with_alibi(attention):
    model = tiny("falcon", attention=attention, alibi=True)
    assert worst_error(model, tokens(WINDOWS * 12), schedule(1, 12, 3), 12, 3) <= TOLERANCE


@st.composite
def streams(draw):
    window = draw(st.integers(2, 64))
    sinks = draw(st.integers(0, window - 1))
    chunk = st.one_of(st.just(1), st.integers(1, window + 20), st.just(window - sinks), st.just(window - sinks + 1))
    steps = draw(st.lists(chunk, min_size=1, max_size=12))
    return window, sinks, steps, draw(st.sampled_from([4, 64, 192])), draw(st.integers(0, 3))


@pytest.mark.parametrize("model_type", ["llama", "cohere", "stablelm"])  # half-split, interleaved, partial
@given(stream=streams())
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_schedule_is_a_counterexample(model_type, stream):
    window, sinks, steps, context, tail = stream
    model = tiny(model_type, attention="sdpa", max_position_embeddings=context)  # a short context sets the clock back
    steps = [*steps, *[1] * (tail * window)]
    assert worst_error(model, tokens(sum(steps)), steps, window, sinks) <= TOLERANCE
