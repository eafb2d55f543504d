"""Which columns of a call are new, by what is given and what a mask says; and which masks tell nothing."""

from __future__ import annotations

import itertools

import pytest

from sink_patch import SinkArgumentError
from sink_patch.rules.columns import Columns


@pytest.mark.parametrize(("read", "given"), [(0, 4), (10, 4), (10, 10), (10, 14), (3, 20)])
def test_a_mask_is_over_what_is_given_or_over_the_whole_stream(read, given):
    for told in range(1, 40):
        if told in (given, read + given):
            columns = Columns.of_call(read, given, told)
            assert 0 < columns.new <= given
            assert columns.stream in (told, read + told)
        else:
            with pytest.raises(SinkArgumentError, match=f"of {told} columns came with {given} columns"):
                Columns.of_call(read, given, told)


def test_without_a_mask_ids_tell():
    for read, given in itertools.product(range(12), range(1, 12)):
        assert Columns.of_call(read, given, None).stream == (given if given > read else read + given)
