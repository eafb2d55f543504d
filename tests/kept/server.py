"""`python -m tests.kept.server LOG serve DIRECTORY ...`: `transformers`, which writes down what its model reads.

A line of JSON for each forward over a sink cache: [number of the cache, [ids]]. Where the file LOG.fault holds the name
of a fault and a number n, the n-th layer from then on fails. The hooks are torch's own, not the model's.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

FAULTS: dict[str, Callable[[str], BaseException]] = {
    "an exception": RuntimeError,
    "out of memory": torch.OutOfMemoryError,
}


def fault_file(log: Path) -> Path:
    """Where a test asks for a fault."""
    return log.with_name(log.name + ".fault")


def run(path: Path) -> None:
    """Run the command line of transformers; forwards are written into a file."""
    from transformers.cli.transformers import main  # here: older versions have none, and tests read FAULTS alone

    asked, numbers = fault_file(path), WeakKeyDictionary[Any, int]()
    count = itertools.count()
    with path.open("w", buffering=1) as log:

        def write_down(_module: Any, _args: Any, given: dict[str, Any], out: Any) -> None:
            cache = given.get("cache", given.get("past_key_values"))
            if hasattr(out, "logits") and type(cache).__name__ == "SinkCache" and given.get("input_ids") is not None:
                log.write(json.dumps([numbers.setdefault(cache, next(count)), given["input_ids"][0].tolist()]) + "\n")

        def fail(module: Any, _args: Any) -> None:
            if type(module).__name__ == "LlamaMLP" and asked.exists():
                name, left = json.loads(asked.read_text())
                asked.write_text(json.dumps([name, left - 1]))
                if left == 1:
                    asked.unlink()
                    raise FAULTS[name]("of a test")

        register_module_forward_hook(write_down, with_kwargs=True)
        register_module_forward_pre_hook(fail)
        main()


if __name__ == "__main__":
    log, *sys.argv[1:] = sys.argv[1:]
    run(Path(log))
