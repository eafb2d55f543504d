"""Two processes that share a model (FSDP2, pipeline parallel, tensor parallel) stream what one with all of it does."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support.fresh import environment
from tests.support.ranks import KINDS, TIMEOUT, outcome_of_loading
from tests.support.shared_calls import CALLS, MODELS, SINK, WHOLE, make, write

ROOT = Path(__file__).parent.parent.parent
SIZES = {"FSDP2 by transformers": "fsdp_size", "pipeline parallel": "pp_size"}
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}  # whatever the host is called


def reason_to_skip(kind: str) -> str | None:
    if not hasattr(os, "fork"):
        return "the two processes are forks of one"
    if not dist.is_available() or not dist.is_gloo_available():
        return "this torch has no gloo, by which two processes on a CPU talk to each other"
    if kind.startswith("FSDP2") and not hasattr(torch.cpu.Stream, "record_event"):
        return "the FSDP2 of this torch asks streams of a CPU for what those of a GPU have"
    size = SIZES.get(kind)
    if size is None:
        return None
    try:
        config = importlib.import_module("transformers.distributed").DistributedConfig
    except ImportError:
        return "this transformers has no DistributedConfig"
    known = size in {field.name for field in dataclasses.fields(config)}
    return None if known else f"the DistributedConfig of this transformers has no {size}"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the models, what one process makes of them, and what each of two has found (tests/support/ranks.py)."""
    made = tmp_path_factory.mktemp("shared")
    for name in MODELS:
        write(name, made / name)
    for name, (model, call) in CALLS.items():
        torch.save(call(make(model), str(made / WHOLE)), made / f"{name}.pt")
    kinds = [kind for kind in KINDS if reason_to_skip(kind) is None]
    variables = environment([ROOT], TORCH_DEVICE_BACKEND_AUTOLOAD="0", **LOOPBACK)
    command = [sys.executable, "-m", "tests.support.ranks", str(made), *kinds]
    subprocess.run(command, cwd=ROOT, env=variables, check=True, timeout=len(kinds) * TIMEOUT + 60)
    return made


@pytest.fixture(scope="module", params=KINDS)
def findings(request: pytest.FixtureRequest, directory: Path) -> list[dict[str, Any]]:
    """What each of the two has found."""
    kind = request.param
    if reason := reason_to_skip(kind):
        pytest.skip(reason)
    found = [directory / f"{kind}.{rank}.json" for rank in range(2)]
    if not all(file.exists() for file in found):
        pytest.fail("\n\n".join((directory / f"{kind}.{rank}.log").read_text()[-3000:] for rank in range(2)))
    read: list[dict[str, Any]] = [{"kind": kind, **json.loads(file.read_text())} for file in found]
    for rank, one in enumerate(read):
        one["own file in the whole"] = outcome_of_loading(directory / f"{kind}.{rank}.safetensors", make("llama"))
    return read


@pytest.mark.parametrize("call", CALLS)
def test_the_text_is_that_of_one_process(findings, call):
    for found in findings:
        assert found[call] != "another text"
        assert found[call] < 1e-5


def test_the_script_of_the_readme_makes_the_same_text_in_two_processes(findings):
    ids = [found["story.py"] for found in findings if found["kind"] == "tensor parallel"]
    for one in ids:
        asked = {**SINK, "window_length": 50, "num_sink_tokens": 4, "max_new_tokens": 20}
        assert one == make("llama").generate(torch.tensor([one[0][:4]]), **asked).tolist()


def test_one_graph_serves_tensor_parallel_and_the_others_decode_without(findings):
    """FSDP keeps the compiler out of its hooks, and torch does not trace what a pipeline sends."""
    for found in findings:
        assert found["graphs"] == (found["kind"] == "tensor parallel")


def test_each_process_loads_what_it_has_saved_and_nothing_else(findings):
    for found in findings:
        assert found["own file"] == "accepted"
        for name in ("the other's file", "that of the whole file", "own file in the whole"):
            assert "not the same: " in found[name], (name, found[name])
            assert "each loads what it has saved" in found[name]
