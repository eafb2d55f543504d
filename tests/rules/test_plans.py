"""The four rules on plain integers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sink_patch.rules.kinds import LayerKind
from sink_patch.rules.plans import plan_row
from sink_patch.rules.rows import Row, Slots
from sink_patch.streaming.steps.step import make_layouts

W, S = 12, 3


@pytest.mark.parametrize(
    ("seen", "new", "past", "shift"),
    [
        pytest.param(0, 5, 0, 0, id="rule 1: a first prompt"),
        pytest.param(7, 5, 7, 0, id="rule 1: the window is just full"),
        pytest.param(0, 20, 0, 0, id="rule 2: a first prompt longer than the window"),
        pytest.param(12, 1, 11, 1, id="rule 3: the first eviction"),
        pytest.param(100, 9, 3, 97, id="rule 3: as many as the ring holds"),
        pytest.param(100, 10, 3, 97, id="rule 4: one more"),
        pytest.param(2, 11, 2, 0, id="rule 4: while the sinks are still coming in"),
    ],
)
def test_rules(seen, new, past, shift):
    plan = plan_row(Row(seen), new, W, S, horizon=10_000)
    assert (plan.past, plan.shift, plan.base, plan.turn) == (past, shift, 0, 0)


@given(
    window=st.integers(1, 40),
    sinks=st.integers(0, 39),
    spare=st.integers(0, 40),
    steps=st.lists(st.integers(1, 60), max_size=60),
)
def test_positions_stay_below_the_horizon_and_consecutive(window, sinks, spare, steps):
    sinks = min(sinks, window - 1)
    horizon, row = window + spare, Row()
    for new in steps:
        plan = plan_row(row, new, window, sinks, horizon)
        if new <= window - sinks or (row.seen == 0 and new <= horizon):
            assert plan.seen + new - 1 - plan.base < horizon
        if plan.past and row.seen >= sinks > 0:
            # the newest sink is shown just before the oldest other token that is seen
            others = plan.past - sinks
            assert plan.sink_turn + sinks == plan.first_position - others
        assert plan.turn == plan.base - row.base >= 0
        assert plan.sink_turn >= 0
        row = replace(row, base=plan.base).after(new, Slots(window))
    assert row.seen == sum(steps)


@given(
    capacity=st.integers(1, 20),
    sinks=st.integers(0, 19),
    steps=st.lists(st.integers(1, 30), min_size=1, max_size=40),
    local=st.booleans(),
)
def test_the_ring_holds_the_first_and_the_newest(capacity, sinks, steps, local):
    """The buffer as a dict of slots: after each forward it holds the tokens of the rules, each in its slot."""
    sinks = 0 if local else min(sinks, capacity - 1)
    kind, row, slots = LayerKind(capacity, sinks, local), Row(), {}
    for new in steps:
        plan = plan_row(row, new, 20 if local else capacity, sinks, horizon=10**9)
        past = [slots[slot + step] for slot, length in kind.past_runs(plan) for step in range(length)]
        assert past == expected_past(row.seen, kind.past(plan), sinks)
        for slot, column, length in kind.write_runs(plan, columns=new):
            slots.update({slot + step: row.seen + column + step for step in range(length)})
        assert all(
            slots[kind.slot(index)] == index for index in range(max(row.seen, sinks), row.seen + new)[-kind.ring :]
        )
        row = row.after(new, Slots(capacity))
        held = sorted({*range(min(sinks, row.seen)), *range(max(0, row.seen - (capacity - sinks)), row.seen)})
        assert sorted(slots.values()) == held
        assert make_layouts([kind], [plan], new)[0].length == kind.past(plan) + new


def expected_past(seen: int, count: int, sinks: int) -> list[int]:
    sinks = min(seen, sinks, count)
    return [*range(sinks), *range(seen - (count - sinks), seen)]
