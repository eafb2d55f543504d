"""`python -m tests.kept.server LOG serve DIRECTORY ...`: `transformers`, which writes down what its model reads.

A line of JSON for each forward over a sink cache: [which cache, [ids]]. The hook is torch's own, not the model's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from torch.nn.modules.module import register_module_forward_hook
from transformers.cli.transformers import main


def run(path: str) -> None:
    """Run the command line of transformers; forwards are written into a file."""
    with Path(path).open("w", buffering=1) as log:

        def write_down(_module: Any, _args: Any, given: dict[str, Any], out: Any) -> None:
            cache = given.get("cache", given.get("past_key_values"))
            if hasattr(out, "logits") and type(cache).__name__ == "SinkCache" and given.get("input_ids") is not None:
                log.write(json.dumps([id(cache), given["input_ids"][0].tolist()]) + "\n")

        register_module_forward_hook(write_down, with_kwargs=True)
        main()


if __name__ == "__main__":
    log, *sys.argv[1:] = sys.argv[1:]
    run(log)
