"""Where texts are cut: any budgets give forwards that see what those of `generate` see, token by token."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sink_patch.generation.inputs.cuts import Cut, Cuts
from sink_patch.rules.plans import plan_row
from sink_patch.rules.rows import Row


def seen(forwards: list[int], window_length: int, num_sink_tokens: int) -> list[tuple[int, ...]]:
    """Which tokens each token sees, by the rules of one forward after the other."""
    found, past = [], 0
    for new in forwards:
        plan = plan_row(Row(past), new, window_length, num_sink_tokens, 10**9)
        sinks = min(past, num_sink_tokens, plan.past)
        cached = [*range(sinks), *range(past - (plan.past - sinks), past)]
        found += [(*cached, *range(past, past + one + 1)) for one in range(new)]
        past += new
    return found


def of_generate(prompt: int, new: int, piece: int | None, context: int, ring: int) -> list[int]:
    """The forwards of `generate`: pieces of a prompt, and single tokens."""
    size = piece or (prompt if prompt <= max(context, ring) else ring)
    return [min(size, prompt - first) for first in range(0, prompt, size)] + [1] * new


@st.composite
def texts(draw):
    window_length = draw(st.integers(2, 12))
    num_sink_tokens = draw(st.integers(0, window_length - 1))
    piece = draw(st.none() | st.integers(1, 15))
    context = draw(st.integers(window_length, 20))
    return Cuts(window_length, num_sink_tokens, context, piece), draw(st.integers(1, 40)), draw(st.integers(0, 10))


@given(texts(), st.data())
def test_any_budgets(text, data):
    cuts, prompt, new = text
    wanted = of_generate(prompt, new, cuts.piece, cuts.context, cuts.window_length - cuts.num_sink_tokens)
    forwards, past = [], 0
    while past < prompt + new:
        cut = cuts.next(past, prompt)
        ahead = min(cut.tokens, prompt + new - past)
        taken = ahead if cut.whole else data.draw(st.integers(1, ahead))
        assert cuts.is_between(past, prompt)
        assert not cut.whole or taken <= cuts.longest(prompt)
        forwards.append(taken)
        past += taken
    sizes = (cuts.window_length, cuts.num_sink_tokens)
    assert seen(forwards, *sizes) == seen(wanted, *sizes)


def test_the_example():
    cuts = Cuts(8, 2, context=32)
    assert cuts.next(0, 20) == Cut(20, whole=True)
    assert cuts.next(0, 8) == Cut(8, whole=False)
    assert cuts.next(20, 20) == Cut(1, whole=True)
    pieces = Cuts(8, 2, context=32, piece=6)
    assert [pieces.next(past, 20) for past in (0, 4, 6, 12, 18)] == [
        Cut(6, whole=False),
        Cut(2, whole=False),
        Cut(6, whole=True),
        Cut(6, whole=True),
        Cut(2, whole=True),
    ]
    assert [past for past in range(20) if not pieces.is_between(past, 20)] == [*range(7, 12), *range(13, 18), 19]
    assert (cuts.longest(20), cuts.longest(8), pieces.longest(20)) == (20, 1, 6)
