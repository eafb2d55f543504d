"""What each of two processes that share a model does: `python -m tests.support.ranks DIRECTORY KIND...`.

The models are in the directory, and what one process with all of a model makes of `CALLS`. Each process writes how far
it is from that, as JSON. All processes are forks of this one, so that the libraries are imported once.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from sink_patch import CacheFileError, SinkCache
from tests.support.oracle import relative_error
from tests.support.shared_calls import CALLS, MODELS, Outcome, of_the_readme

TIMEOUT = 200  # seconds for one kind; two to six on an idle machine


def _whole(directory: Path, **how: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, **how).eval()


def _fully_sharded(directory: Path) -> Any:
    """FSDP2 as torch has it, around each layer and the model."""
    from torch.distributed.fsdp import fully_shard

    model, mesh = _whole(directory), dist.init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _by_config(size: str) -> Callable[[Path], Any]:
    def shared(directory: Path) -> Any:
        from transformers.distributed import DistributedConfig

        return _whole(directory, distributed_config=DistributedConfig(**{size: 2}))

    return shared


KINDS: dict[str, Callable[[Path], Any]] = {
    "FSDP2": _fully_sharded,
    "FSDP2 by transformers": _by_config("fsdp_size"),
    "pipeline parallel": _by_config("pp_size"),
    "tensor parallel": lambda directory: _whole(directory, tp_plan="auto"),
}


def outcome_of_loading(path: Path, model: Any) -> str:
    """The message of the refusal, or "accepted"."""
    try:
        SinkCache.load(path, model=model)
    except CacheFileError as error:
        return str(error)
    return "accepted"


def _distance(found: Outcome, wanted: Outcome) -> float | str:
    if not torch.equal(found[0], wanted[0]):
        return "another text"
    return relative_error(found[1], wanted[1]) if len(wanted[1]) else 0.0


def _findings(kind: str, directory: Path, rank: int) -> dict[str, Any]:
    shared = {name: KINDS[kind](directory / name) for name in MODELS}
    file, findings = directory / f"{kind}.{rank}.safetensors", {}
    for name, (model, call) in CALLS.items():
        findings[name] = _distance(call(shared[model], str(file)), torch.load(directory / f"{name}.pt"))
    findings["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    if kind == "tensor parallel":
        findings["story.py"] = of_the_readme(directory / "llama").tolist()
    dist.barrier()  # the files are written
    others = {"own": file, "the other's": directory / f"{kind}.{1 - rank}.safetensors"}
    for name, path in {**others, "that of the whole": directory / "whole.safetensors"}.items():
        findings[f"{name} file"] = outcome_of_loading(path, shared["llama"])
    return findings


def _rank(kind: str, directory: Path, rank: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    with (directory / f"{kind}.{rank}.log").open("w") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    dist.init_process_group("gloo", init_method=f"file://{directory / kind}.meeting", rank=rank, world_size=2)
    found = _findings(kind, directory, rank)
    (directory / f"{kind}.{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _pair(kind: str, directory: Path) -> None:
    """Two processes, until both have ended or one has failed."""
    forking = multiprocessing.get_context("fork")
    ranks = [forking.Process(target=_rank, args=(kind, directory, rank)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    until = time.monotonic() + TIMEOUT
    # asked once a round: to wait for none, as both may end meanwhile, would take until the timeout
    while (alive := [rank.sentinel for rank in ranks if rank.is_alive()]) and not any(rank.exitcode for rank in ranks):
        if not wait(alive, timeout=until - time.monotonic()):
            break
    for rank in ranks:
        rank.kill()
        rank.join()


def main() -> None:
    directory, *kinds = sys.argv[1:]
    torch.set_num_threads(1)
    torch.compile(torch.neg, backend="eager")(torch.ones(1))  # what dynamo loads once, no fork need load again
    torch._dynamo.utils.counters.clear()
    for kind in kinds:
        _pair(kind, Path(directory))


if __name__ == "__main__":
    main()
