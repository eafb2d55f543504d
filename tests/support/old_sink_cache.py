"""Run as a script, under transformers 4.52.4: the logits of its own `SinkCache`, token by token.

`python old_sink_cache.py DIR ...` reads from each DIR job.json (config of a Llama in the names of 4.x, window_length,
num_sink_tokens), weights.pt and tokens.pt [rows, tokens]; it writes logits.pt [rows, tokens, vocab] there. Positions
are clamped to window_length - 1, which is the one way in which that cache can be right.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers


@torch.no_grad()
def run(directory: Path) -> torch.Tensor:
    job = json.loads((directory / "job.json").read_text())
    config = transformers.LlamaConfig(**job["config"])
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()
    model.load_state_dict(torch.load(directory / "weights.pt", weights_only=True))
    stream = torch.load(directory / "tokens.pt", weights_only=True)
    cache = transformers.SinkCache(window_length=job["window_length"], num_sink_tokens=job["num_sink_tokens"])
    logits = []
    for index in range(stream.shape[1]):
        position = torch.tensor([min(index, job["window_length"] - 1)])
        output = model(
            stream[:, index : index + 1],
            past_key_values=cache,
            position_ids=position[None].expand(stream.shape[0], 1),
            cache_position=position,
        )
        logits.append(output.logits[:, -1])
    return torch.stack(logits, dim=1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if transformers.__version__ != "4.52.4" or "sink_patch" in sys.modules:
        sys.exit(f"transformers {transformers.__version__}, sink_patch loaded: {'sink_patch' in sys.modules}")
    for argument in sys.argv[1:]:
        torch.save(run(Path(argument)), Path(argument) / "logits.pt")
