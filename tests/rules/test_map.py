"""The drawing of a ring in sink_patch/README.md is what the rules say."""

from __future__ import annotations

import re
from pathlib import Path

from sink_patch.rules.kinds import LayerKind
from sink_patch.rules.plans import plan_row
from sink_patch.rules.rows import Row, Slots

MAP = Path(__file__).parent.parent.parent / "sink_patch" / "README.md"
W, S, HORIZON = 6, 2, 12


def drawn() -> dict[int, tuple[list[str], int]]:
    """By the newest token: token@position in each slot, and the base."""
    lines = [line.split() for line in MAP.read_text().splitlines() if re.match(r" +\d+ +0@", line)]
    return {int(line[0]): ([word for word in line[1:-1] if word != "|"], int(line[-1])) for line in lines}


def computed() -> dict[int, tuple[list[str], int]]:
    kind, row, held, states = LayerKind(W, S), Row(), {}, {}
    for token in range(13):
        plan = plan_row(row, 1, W, S, HORIZON)
        ((slot, _column, _length),) = kind.write_runs(plan, columns=1)
        held[slot] = token
        position = {one: one - plan.base + (plan.shift if one < S else 0) for one in held.values()}
        states[token] = ([f"{held[slot]}@{position[held[slot]]}" for slot in sorted(held)], plan.base)
        row = Row(token + 1, plan.base).after(0, Slots(W))
    return states


def test_the_drawing_of_a_ring_whose_sinks_walk():
    assert len(drawn()) == 5
    assert drawn() == {token: computed()[token] for token in drawn()}


def test_each_file_that_it_names_is_there():
    """Folders are those of sink_patch, of the top level, or of the room that the sentence is about."""
    named = set(re.findall(r"`([\w/]+\.(?:py|md|toml))`", MAP.read_text()))
    root = MAP.parent.parent
    places = [root, root / "sink_patch", root / "sink_patch" / "generation"]
    assert len(named) > 20
    assert {name for name in named if not any((place / name).exists() for place in places)} == set()
