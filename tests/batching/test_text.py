"""Requests beside each other get the text that `generate` gives each of them alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings

from tests.batching.cases import Case, cases, check_case, model, run
from tests.batching.serving import needs_batching

pytestmark = needs_batching

PAST_ALL = Case(
    window_length=16,
    num_sink_tokens=3,
    piece=None,
    page_size=5,
    budget=0,
    lengths=((3, 46), (30, 8), (50, 3), (1, 5)),
    joins=(0, 2, 3, 9),
    room=2,
    seed=1,
)
"""Past three windows and the end of the context; prompts in one piece, and in pieces as they are longer than it."""

QUICK = ["llama", "mistral", "gemma3_text", "smollm3"]
"""All are in `python -m tests.batching.sweep`."""


@pytest.mark.parametrize("name", QUICK)
def test_past_three_windows_and_the_end_of_the_context(name):
    check_case(model(name), PAST_ALL)


@settings(max_examples=2, deadline=None)
@given(cases(requests=3, windows=(16, 24), longest=2))
def test_any_requests(case):
    check_case(model("qwen3", "sdpa"), case)


def test_text_does_not_depend_on_load():
    tested, case = model("llama"), replace(PAST_ALL, lengths=((38, 20),) * 5, joins=(0, 1, 4, 9, 20))
    texts, beside = set(), []
    for budget, room in ((0, 1), (7, 3), (400, 5)):
        results, manager = run(tested, replace(case, budget=budget, room=room))
        texts.add(tuple(tuple(one.generated_tokens) for one in results))
        beside.append(manager.beside)
    alone, _ = run(tested, replace(case, lengths=((38, 20),), joins=(0,)))
    assert len(texts) == 1
    assert tuple(alone[0].generated_tokens) == texts.pop()[0]
    assert beside[0] < beside[-1], "the loads do not differ"


def test_pieces_that_are_asked_for():
    for piece in (7, 13):
        check_case(model("llama"), replace(PAST_ALL, piece=piece, lengths=((40, 6), (33, 5)), joins=(0, 2)))
