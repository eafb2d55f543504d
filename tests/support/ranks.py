"""What each of two processes that share a model does: `python -m tests.support.ranks KIND DIRECTORY`, with RANK set.

The model is in the directory, and what one process with all of it makes of `CALLS`. Each process prints how far it is
from that, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from sink_patch import CacheFileError, SinkCache
from tests.support.oracle import relative_error

_ASKED = {"cache_implementation": "sink", "window_length": 12, "num_sink_tokens": 3, "do_sample": False}
_WANTED = {"max_new_tokens": 35, "return_dict_in_generate": True, "output_logits": True}  # past a context of 40


def _whole(directory: str, **how: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, **how).eval()


def _fully_sharded(directory: str) -> Any:
    """FSDP2 as torch has it, around each layer and the model."""
    from torch.distributed.fsdp import fully_shard

    model, mesh = _whole(directory), dist.init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _by_config(size: str) -> Callable[[str], Any]:
    def shared(directory: str) -> Any:
        from transformers.distributed import DistributedConfig

        return _whole(directory, distributed_config=DistributedConfig(**{size: 2}))

    return shared


KINDS: dict[str, Callable[[str], Any]] = {
    "FSDP2": _fully_sharded,
    "FSDP2 by transformers": _by_config("fsdp_size"),
    "pipeline parallel": _by_config("pp_size"),
    "tensor parallel": lambda directory: _whole(directory, tp_plan="auto"),
}


def _tokens(rows: int) -> torch.Tensor:
    return torch.randint(2, 97, (rows, 7), generator=torch.Generator().manual_seed(rows))


def _second_turn(model: Any, path: str) -> Any:
    """A text goes on in a cache that was saved and loaded."""
    first = model.generate(_tokens(1), **_ASKED, **_WANTED)
    first.past_key_values.save(path)
    cache, more = SinkCache.load(path, model=model), torch.cat((first.sequences, _tokens(2)[:1]), dim=1)
    return model.generate(more, past_key_values=cache, do_sample=False, **_WANTED)


def _padded_beams(model: Any, _path: str) -> Any:
    padding = torch.ones(2, 7, dtype=torch.long)
    padding[0, :3] = 0
    return model.generate(_tokens(2), attention_mask=padding, num_beams=2, **_ASKED, **_WANTED)


CALLS: dict[str, Callable[[Any, str], Any]] = {"padded rows, beams": _padded_beams, "saved and loaded": _second_turn}
"""From a model and the path of a file to the output of `generate`."""


def outcome_of_loading(path: str, model: Any) -> str:
    """The message of the refusal, or "accepted"."""
    try:
        SinkCache.load(path, model=model)
    except CacheFileError as error:
        return str(error)
    return "accepted"


def _findings(kind: str, directory: str, rank: int) -> dict[str, Any]:
    shared, findings = KINDS[kind](directory), {}
    for name, call in CALLS.items():
        found = call(shared, f"{directory}/{rank}.safetensors")
        text, logits = torch.load(f"{directory}/{name}.pt")
        same = torch.equal(found.sequences, text) and type(found.past_key_values) is SinkCache
        findings[name] = relative_error(torch.stack(found.logits), logits) if same else "another text"
    dist.barrier()  # the files are written
    for name, file in {"own": rank, "the other's": 1 - rank, "that of the whole": "whole"}.items():
        findings[f"{name} file"] = outcome_of_loading(f"{directory}/{file}.safetensors", shared)
    return findings


def main() -> None:
    kind, directory = sys.argv[1:]
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=2)
    print(json.dumps(_findings(kind, directory, rank)))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
