"""All families, single changes of a call, and some at random: `python -m tests.sweep [--random N] [MODEL_TYPE ...]`."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from collections.abc import Sequence

import torch
from tqdm import tqdm
from transformers.utils import logging

import sink_patch
from tests.support import zoo
from tests.sweep.calls import calls
from tests.sweep.sweep import tried


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what is wrong, the reasons of refusals, and counts; returns 1 if something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.sweep", description=__doc__)
    parser.add_argument("--random", type=int, default=12, metavar="N", help="calls at random for each family (12)")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("families", nargs="*", metavar="MODEL_TYPE", help="these alone; none: all that are exact")
    asked = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for number, model_type in enumerate(tqdm(asked.families or exact(), unit="family")):
        for call in calls(asked.seed + number, asked.random):
            outcome = tried(model_type, call, asked.seed)
            counts[outcome.verdict] += 1
            if outcome.verdict == "wrong":
                tqdm.write(str(outcome))
            if outcome.verdict == "refused":
                reasons[f"{model_type}: {outcome.why[:150]}"] += 1
    print(*(f"refused {count} times: {reason}" for reason, count in sorted(reasons.items())), sep="\n")
    verdicts = ", ".join(f"{counts[name]} {name}" for name in ("right", "refused", "wrong"))
    print(f"{sum(counts.values())} calls: {verdicts}")
    return 1 if counts["wrong"] else 0


def exact() -> list[str]:
    """The families that stream, and whose models can be built."""
    verdicts = [verdict.model_type for verdict in sink_patch.coverage().verdicts if verdict.exact]
    return [model_type for model_type in verdicts if model_type not in zoo.NOT_BUILT]


if __name__ == "__main__":
    sys.exit(main())
