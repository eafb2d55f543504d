"""Pieces of a prompt that cut no image, and the positions that images save."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sink_patch.rules.media import behind_image, images_of_rows, pieces, places_of, position_of, spans_of
from sink_patch.rules.plans import plan_row
from sink_patch.rules.rows import Row, Slots

_ = False
X = True


@pytest.mark.parametrize(
    ("joined", "size", "wanted"),
    [
        ([_, _, _, X, X, X, X, _, _, _], 4, [(0, 2), (2, 7), (7, 10)]),
        ([_] * 5, 2, [(0, 2), (2, 4), (4, 5)]),
        ([_, X, X, _, _], 9, [(0, 5)]),
        ([_, X, X, X], 2, [(0, 4)]),
    ],
)
def test_pieces_cut_no_image(joined, size, wanted):
    assert pieces(joined, size) == wanted


def placed() -> tuple[Row, list[int]]:
    """The row of the docstring, after its prompt: an image of 8 tokens and 4 positions behind 3 tokens."""
    lowest = [0, 1, 2, *[3] * 8, 7, 8]
    of_image = [3 <= index < 11 for index in range(13)]
    return Row(seen=13, places=places_of(of_image, lowest, 9)), lowest


def test_positions_lag_by_what_images_save():
    row, lowest = placed()
    assert row.places == ((3, 3, False), (11, 7, True))
    assert [position_of(row.places, index) for index in range(16)] == [*lowest, 9, 10, 11]
    assert row.lag == 4


@pytest.mark.parametrize("sinks", [0, 3, 11, 12])
def test_sinks_stand_just_before_the_oldest_token_or_image_behind_them(sinks):
    row, _lowest = placed()
    window = 6 + sinks
    for _step in range(20):
        plan = plan_row(row, 1, window, sinks, 10**6)
        oldest = row.seen + 1 - (window - sinks)
        if oldest > sinks:
            assert plan.shift == position_of(row.places, oldest) - position_of(row.places, sinks)
        assert plan.first_position == row.seen - 4
        row = row.after(1, Slots(window))


def test_an_image_is_not_taken_back_in_parts():
    row = Row(**{**vars(placed()[0]), "seen": 15})
    assert row.can_lose(4, 3)
    assert not row.can_lose(5, 3)


def test_the_clock_goes_back_where_a_position_comes_to_the_horizon_not_a_token():
    row, _lowest = placed()
    window, sinks, horizon, positions = 9, 3, 20, []
    while not positions or positions[-1] > positions[0] - 1:  # until one is smaller than the first
        plan = plan_row(row, 1, window, sinks, horizon)
        positions.append(plan.first_position)
        row = replace(row.after(1, Slots(window)), base=plan.base)
    assert positions == [*range(9, horizon), window - 1]


def test_a_later_turn_begins_with_an_image_where_an_image_has_ended():
    before = places_of([False, True, True], [0, 1, 1], 2)
    assert before == ((1, 1, False), (3, 2, True))
    assert places_of([True, True, False], [2, 2, 3], 4, before, 3) == ((1, 1, False), (3, 2, False), (5, 3, True))


def test_images_of_a_batch_belong_to_rows_by_their_sizes():
    assert images_of_rows([8, 0, 16], [1, 1, 1]) == [range(1), range(1, 1), range(1, 3)]
    assert images_of_rows([8, 16], [4, 2, 6]) == [range(1), range(1, 3)]
    assert images_of_rows([0, 30], [1, 1, 1, 1]) == [range(0), range(4)]
    for tokens, sizes in (([8, 9], [1, 1]), ([0, 0], [1]), ([8, 8], [1])):
        assert images_of_rows(tokens, sizes) is None


def test_images_are_runs_of_their_tokens():
    assert spans_of([_, X, X, _, X], 10) == ((11, 13), (14, 15))
    assert spans_of([X, X], 0) == ((0, 2),)
    assert spans_of([_, _], 5) == ()


@pytest.mark.parametrize(
    ("begins", "until", "wanted"),
    [(5, 20, None), (6, 20, 9), (8, 20, 9), (9, 20, None), (6, 8, None), (13, 20, None), (2, 20, None)],
)
def test_a_window_that_would_begin_within_an_image_begins_behind_it(begins, until, wanted):
    """2 sinks, a ring of 6; images that begin among the sinks or are longer than the ring are none."""
    assert behind_image([(1, 3), (5, 9), (12, 19)], range(begins, until + 1), 2, 6) == wanted
