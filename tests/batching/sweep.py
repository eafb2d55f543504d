"""Many cases by hand, over all families of the oracle test: `python -m tests.batching.sweep [--examples N] [NAME ...]`.

For each stack of two layers (`stacks` in cases.py): requests of random lengths that come and go, each compared with
`generate`. Models that are refused are named with the reason.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from transformers.utils import logging

from sink_patch import SinkPatchError
from sink_patch.batching.managers import service_for
from tests.batching.cases import Case, Checked, cases, check_case, model, model_type_of, stacks
from tests.batching.serving import config
from tests.bench import records
from tests.support.tiny import FAMILIES

UNTIED = {"tie_word_embeddings": False}  # else the next token is often the same one
ALL_HEADS = ("gptj", "codegen", "gpt_neox", "persimmon", "falcon")  # have as many of keys as of queries


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--examples", type=int, default=3, help="for each stack; the first is the simplest (%(default)s)"
    )
    parser.add_argument("--requests", type=int, default=32, help="of an example (%(default)s)")
    parser.add_argument("--attention", default="sdpa", help="where a family has it, else eager (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help="families; none: all")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = {}
    for number, (name, stack) in enumerate(_stacks(arguments.names or FAMILIES)):
        start = time.monotonic()
        rows[name] = _row(name, stack, arguments, arguments.seed + number)
        print(f"{name:48} {rows[name]} ({time.monotonic() - start:.0f} s)", flush=True)
    asked = {name: getattr(arguments, name) for name in ("examples", "requests", "attention", "seed")}
    records.write(arguments.json, **asked, stacks=rows)
    return 1 if any("wrong" in row for row in rows.values()) else 0


def _stacks(model_types: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    for model_type in model_types:
        yield from stacks(model_type)


def _row(name: str, stack: dict[str, Any], arguments: argparse.Namespace, number: int) -> dict[str, Any]:
    """What is found of a stack."""
    heads = {"num_key_value_heads": 4} if model_type_of(name) in ALL_HEADS else {}
    build = functools.partial(model, name, **UNTIED, **heads, **stack)
    attention = arguments.attention if type(build())._supports_sdpa else "eager"
    tested, found = build(attention), list[Checked]()
    try:
        service_for(tested, config(16, 2))
    except SinkPatchError as refused:
        return {"refused": str(refused)}

    @seed(number)
    @settings(
        max_examples=arguments.examples,
        phases=[Phase.generate],  # a failing case is not made smaller
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(arguments.requests))
    def each(case: Case) -> None:
        found.append(check_case(tested, case))

    try:
        each()
    except Exception as failure:  # the other stacks are tried all the same
        traceback.print_exception(failure)
        return {"wrong": f"{type(failure).__name__}: {failure}"}
    return {
        "attention": attention,
        "examples": len(found),
        **{key: sum(getattr(one, key) for one in found) for key in ("requests", "past_windows", "set_back", "tokens")},
        "most_beside": max(one.most_beside for one in found),
        "log_probability_off": max(one.off for one in found),
    }


if __name__ == "__main__":
    sys.exit(main())
