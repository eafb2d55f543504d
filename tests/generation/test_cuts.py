"""Where texts are cut: any budgets give forwards that see what those of `generate` see, token by token."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sink_patch.generation.inputs.cuts import Cut, Cuts, Text
from sink_patch.rules.plans import plan_row
from sink_patch.rules.rows import Row


def seen(begin: int, forwards: list[int], window_length: int, num_sink_tokens: int) -> list[tuple[int, ...]]:
    """Which tokens each token sees, by the rules of one forward after the other, where some were read before."""
    found, past = [], begin
    for new in forwards:
        plan = plan_row(Row(past), new, window_length, num_sink_tokens, 10**9)
        sinks = min(past, num_sink_tokens, plan.past)
        cached = [*range(sinks), *range(past - (plan.past - sinks), past)]
        found += [(*cached, *range(past, past + one + 1)) for one in range(new)]
        past += new
    return found


def of_generate(text: Text, new: int, cuts: Cuts) -> list[int]:
    """The forwards of `generate` behind what was read before: pieces of both parts of a prompt, and single tokens."""
    ring, unread = cuts.window_length - cuts.num_sink_tokens, text.prompt - text.begin
    at_once = unread <= ring or unread + min(text.begin, cuts.num_sink_tokens) <= cuts.context
    size = cuts.piece or (unread if at_once else ring)
    pause = text.pause if text.begin < text.pause < text.prompt else text.prompt
    pieces = [min(size, pause - first) for first in range(text.begin, pause, size)]
    return [*pieces, *(min(size, text.prompt - first) for first in range(pause, text.prompt, size)), *[1] * new]


@st.composite
def texts(draw):
    window_length = draw(st.integers(2, 12))
    num_sink_tokens = draw(st.integers(0, window_length - 1))
    piece = draw(st.none() | st.integers(1, 15))
    context = draw(st.integers(window_length, 20))
    prompt = draw(st.integers(1, 40))
    begin, pause = draw(st.integers(0, prompt - 1)), draw(st.integers(0, prompt))
    text = Text(prompt, *draw(st.sampled_from([(), (begin,), (begin, pause)])))
    return Cuts(window_length, num_sink_tokens, context, piece), text, draw(st.integers(0, 10))


@given(texts(), st.data())
def test_any_budgets(given_text, data):
    cuts, text, new = given_text
    wanted, forwards, past, ends, needed = of_generate(text, new, cuts), [], text.begin, set(), [1]
    while past < text.prompt + new:
        cut = cuts.next(past, text)
        ahead = min(cut.tokens, text.prompt + new - past)
        taken = ahead if cut.whole else data.draw(st.integers(1, ahead))
        assert cuts.is_between(past, text)
        assert not cut.whole or taken <= cuts.longest(text)
        if cut.whole and past < text.prompt:
            needed.append(taken + min(past, cuts.num_sink_tokens))
        forwards.append(taken)
        past += taken
        ends.add(past)
    sizes = (cuts.window_length, cuts.num_sink_tokens)
    assert seen(text.begin, forwards, *sizes) == seen(text.begin, wanted, *sizes)
    assert len(text.parts) == 1 or text.pause in ends, "a copy could not be made there"
    assert cuts.positions(text) == max(needed)


def test_the_example():
    cuts, text = Cuts(8, 2, context=32), Text(20)
    assert cuts.next(0, text) == Cut(20, whole=True)
    assert cuts.next(0, Text(8)) == Cut(8, whole=False)
    assert cuts.next(20, text) == Cut(1, whole=True)
    pieces = Cuts(8, 2, context=32, piece=6)
    assert [pieces.next(past, text) for past in (0, 4, 6, 12, 18)] == [
        Cut(6, whole=False),
        Cut(2, whole=False),
        Cut(6, whole=True),
        Cut(6, whole=True),
        Cut(2, whole=True),
    ]
    assert [past for past in range(20) if not pieces.is_between(past, text)] == [*range(7, 12), *range(13, 18), 19]
    assert (cuts.longest(text), cuts.longest(Text(8)), pieces.longest(text)) == (20, 1, 6)
