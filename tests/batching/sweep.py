"""Many cases by hand: `python -m tests.batching.sweep [--examples N] [--requests N] [--attention sdpa]`."""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable

from hypothesis import HealthCheck, given, seed, settings

from tests.batching.cases import MODELS, Case, cases, check_case, model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=3)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for name in MODELS:
        start, tested = time.monotonic(), functools.partial(check_case, model(name, arguments.attention))
        _each(arguments, tested)
        print(f"{name:36} as in generate ({time.monotonic() - start:.0f} s)", flush=True)
    return 0


def _each(arguments: argparse.Namespace, tested: Callable[[Case], None]) -> None:
    @seed(arguments.seed)
    @settings(max_examples=arguments.examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(cases(arguments.requests))
    def each(case: Case) -> None:
        tested(case)

    each()


if __name__ == "__main__":
    sys.exit(main())
