"""A sample of the sweep (`python -m tests.sweep` runs all of it), and that each of its three comparisons can fail."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sink_patch.streaming.inputs import Call as CallInProgress
from tests.sweep import sweep
from tests.sweep.__main__ import exact
from tests.sweep.calls import Call, at_random, single_changes
from tests.sweep.sweep import tried

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers: the text is longer than the context, say


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(model_type=st.sampled_from(exact()), seed=st.integers(0, 2**16))
def test_a_call_at_random_is_right_or_refused_by_name(model_type, seed):
    outcome = tried(model_type, next(at_random(seed)), seed % 3)
    assert outcome.verdict != "wrong", outcome


@pytest.mark.parametrize("call", list(single_changes()), ids=str)
def test_each_single_change_is_right(call):
    assert tried("llama", call).verdict == "right"


def test_a_forward_that_sees_other_tokens_is_found(monkeypatch):
    measured = sweep.worst_error
    monkeypatch.setattr(sweep, "worst_error", lambda model, row, window, sinks: measured(model, row, window, sinks - 1))
    assert "logits are off" in tried("llama", Call()).why


def test_tokens_that_are_read_twice_are_found(monkeypatch):
    monkeypatch.setattr(CallInProgress, "read_again", lambda _self, _inputs, _mask, _read: 0)
    assert tried("llama", Call(feeding="pieces", second_turn="new tokens")).verdict != "right"


def test_another_text_is_found(monkeypatch):
    monkeypatch.setattr(sweep, "_not_fed", lambda *_: "")
    monkeypatch.setattr(sweep, "worst_error", lambda *_: 0.0)
    generate = sweep._generate

    def off_by_one(*args, default=False, **more):
        out = generate(*args, default=default, **more)
        out.sequences = out.sequences + int(default)
        return out

    monkeypatch.setattr(sweep, "_generate", off_by_one)
    assert "another text" in tried("llama", Call(window="large")).why
