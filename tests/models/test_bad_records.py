"""What third parties register is looked at as they write it, and not when a model of theirs is first used."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

import sink_patch
from sink_patch import Adapter, Family, PositionLimit, Rotation, SinkArgumentError, UnsupportedModelError
from tests.support.tiny import tiny


def no_adapters(_model):
    return []


FREQUENCIES = torch.rand(4)
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "frequencies in a list": (lambda: Rotation([1.0, 0.1]), r"inv_freq=\[1.0, 0.1\]"),
    "frequencies of rows": (lambda: Rotation(torch.rand(2, 2)), "Give a tensor of floats"),
    "whole frequencies": (lambda: Rotation(torch.ones(2, dtype=torch.long)), "Give a tensor of floats"),
    "an unknown pairing": (lambda: Rotation(FREQUENCIES, "pairs"), "pairing='pairs' is not known.*interleaved"),
    "an unknown sign": (lambda: Rotation(FREQUENCIES, sign=0), "sign=0 is not known"),
    "a start before the head": (lambda: Rotation(FREQUENCIES, start=-2), "start=-2 is negative"),
    "a tensor as a rotation": (lambda: Adapter(FREQUENCIES), "keys of an Adapter are a Tensor"),
    "a rotation of values that is none": (lambda: Adapter(None, "half"), "values of an Adapter are a str"),
    "rope of an unknown pairing": (lambda: sink_patch.rope("neox"), "pairing='neox' is not known"),
    "rope of an unknown sign": (lambda: sink_patch.rope(sign=2), "sign=2 is not known"),
    "rope from nowhere": (lambda: sink_patch.rope(start="tail"), "start='tail' is a str"),
    "rope that skips numbers": (lambda: sink_patch.rope(skips=[3]), r"skips=\[3\] is a list. Give a function"),
    "a table of a number": (lambda: sink_patch.sinusoidal_table(8), "dim=8 is a int. Give a function"),
    "a table of an unknown pairing": (lambda: sink_patch.sinusoidal_table(len, "x"), "pairing='x' is not known"),
    "a limit that is a number": (lambda: PositionLimit(2048, "it has a table"), "of=2048 is a int. Give a function"),
    "a family without a name": (lambda: Family("", ("a",), no_adapters), "has the name ''"),
    "a family of one text": (lambda: Family("a", "a", no_adapters), "must be a tuple of names"),
    "a family of adapters": (lambda: Family("a", ("a",), [Adapter()]), "adapters=.* is a list. Give a function"),
    "a family formerly of a number": (lambda: Family("a", ("a",), no_adapters, formerly=3), "formerly=3 is a int"),
    "a family with a number": (lambda: Family("a", ("a",), no_adapters, position_limit=9), "position_limit=9 is no"),
    "a family from elsewhere": (lambda: Family("a", ("a",), no_adapters, position_source="x"), "position_source='x'"),
    "registered without a name": (lambda: sink_patch.register_family(no_adapters), r"Write @register_family\('model"),
    "registered for a text": (lambda: sink_patch.register_family("a", model_types="abc"), r"a list of them, \['abc'\]"),
    "registered for nothing": (lambda: sink_patch.register_family("")(no_adapters), "has the name ''"),
    "registered adapters": (lambda: sink_patch.register_family("a")([Adapter()]), "Give a function from a model"),
}


@pytest.mark.parametrize(("make", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_registered_is_refused_at_once(make, said):
    before = dict(sink_patch.families())
    with pytest.raises(SinkArgumentError, match=said):
        make()
    assert dict(sink_patch.families()) == before


GIVEN = {
    "nothing": lambda _model: None,
    "one adapter": lambda _model: Adapter(Rotation(FREQUENCIES)),
    "rotations": lambda _model: [Rotation(FREQUENCIES)] * 2,
    "too few": lambda _model: [Adapter(Rotation(FREQUENCIES))],
}


@pytest.mark.parametrize("given", GIVEN)
def test_a_function_that_gives_no_adapters_is_named(given):
    model = copy.deepcopy(tiny("llama", layers=2))
    model.config.model_type = "outer"
    sink_patch.register_family("outer")(GIVEN[given])
    with pytest.raises(UnsupportedModelError, match="The family 'outer' gave .* Mend the family's function"):
        sink_patch.inspect(model)
