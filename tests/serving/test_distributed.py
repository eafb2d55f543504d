"""Two processes that share a model (FSDP2, pipeline parallel, tensor parallel) stream what one with all of it does."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support.fresh import environment
from tests.support.ranks import CALLS, KINDS, outcome_of_loading
from tests.support.tiny import tiny

ROOT = Path(__file__).parent.parent.parent
SIZES = {"FSDP2 by transformers": "fsdp_size", "pipeline parallel": "pp_size"}
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}  # whatever the host is called
TIMEOUT = 300  # seconds; some ten on an idle machine


def reason_to_skip(kind: str) -> str | None:
    if not dist.is_available() or not dist.is_gloo_available():
        return "this torch has no gloo, by which two processes on a CPU talk to each other"
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
    """With a model, and what one process makes of it."""
    made = tmp_path_factory.mktemp("shared")
    model = tiny("llama", layers=2, max_position_embeddings=40)
    model.save_pretrained(made)
    for name, call in CALLS.items():
        out = call(model, str(made / "whole.safetensors"))
        torch.save((out.sequences, torch.stack(out.logits)), made / f"{name}.pt")
    return made


@pytest.fixture(scope="module", params=KINDS)
def findings(request: pytest.FixtureRequest, directory: Path) -> list[dict[str, Any]]:
    """What each of the two has found (tests/support/ranks.py)."""
    if reason := reason_to_skip(request.param):
        pytest.skip(reason)
    (directory / "meeting").unlink(missing_ok=True)
    common = environment([ROOT], WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", TORCH_DEVICE_BACKEND_AUTOLOAD="0", **LOOPBACK)
    command = [sys.executable, "-m", "tests.support.ranks", request.param, str(directory)]
    logs = [[directory / f"{rank}.{what}" for what in ("out", "err")] for rank in range(2)]
    with contextlib.ExitStack() as stack:
        ranks = []
        for rank, paths in enumerate(logs):
            out, err = (stack.enter_context(path.open("w")) for path in paths)
            variables = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen(command, cwd=ROOT, env=variables, stdout=out, stderr=err))
            stack.callback(ranks[-1].wait)
            stack.callback(ranks[-1].kill)  # comes first
        codes = [rank.wait(timeout=TIMEOUT) for rank in ranks]
    assert codes == [0, 0], "\n\n".join(err.read_text()[-3000:] for _, err in logs)
    found = [json.loads(out.read_text().splitlines()[-1]) for out, _ in logs]
    for rank, one in enumerate(found):
        path = str(directory / f"{rank}.safetensors")
        one["own file in the whole"] = outcome_of_loading(path, tiny("llama", layers=2, max_position_embeddings=40))
    return found


def test_the_text_is_that_of_one_process(findings):
    for found in findings:
        for name in CALLS:
            assert found[name] != "another text"
            assert found[name] < 1e-5


def test_each_process_loads_what_it_has_saved_and_nothing_else(findings):
    for found in findings:
        assert found["own file"] == "accepted"
        for name in ("the other's file", "that of the whole file", "own file in the whole"):
            assert "not the same: " in found[name], (name, found[name])
            assert "each loads what it has saved" in found[name]
