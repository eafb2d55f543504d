"""Run a snippet in a new interpreter, because the patch is applied when modules are imported."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_SWITCHES = ("SINK_PATCH_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD", "PYTHONWARNINGS")
STRICT = ("-W", "error::UserWarning")
NO_ENTRY_POINT = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}

# A stream of 103 tokens: longer than the model's context (64) and than the window (12).
STREAM = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, max_position_embeddings=64, eos_token_id=None))
asked = dict(cache_implementation="sink", window_length=12, num_sink_tokens=3, max_new_tokens=100, do_sample=False)
made = model.generate(torch.tensor([[5, 6, 7]]), **asked, return_dict_in_generate=True)
assert repr(made.past_key_values).startswith("SinkCache(window_length=12, num_sink_tokens=3, "), made.past_key_values
assert made.sequences.shape == (1, 103) and made.past_key_values.get_seq_length() == 102
assert ours() == [1, 1] and CHOICES().count("sink") == 1
"""

# ours(): how many wrappers of sink_patch are around each wrapped method; CHOICES(): the values of
# cache_implementation that a config accepts; refused(): whether transformers refuses "sink".
_PRELUDE = """
def ours():
    from transformers.generation.utils import GenerationMixin
    found = []
    for name in ("_prepare_generation_config", "_prepare_cache_for_generation"):
        method, count = vars(GenerationMixin)[name], 0
        while method is not None:
            count += getattr(getattr(method, "_self_wrapper", None), "__module__", "").startswith("sink_patch")
            method = getattr(method, "__wrapped__", None)
        found.append(count)
    return found

def CHOICES():
    from transformers.generation import configuration_utils
    return configuration_utils.ALL_CACHE_IMPLEMENTATIONS

def refused():
    from transformers import GenerationConfig
    try:
        GenerationConfig(cache_implementation="sink")
    except ValueError as refusal:
        message = str(refusal).replace("[", "(")  # a list, and later a tuple
        return message.startswith("Invalid `cache_implementation` (sink). Choose one of: ('static', ")
    return False
"""


@dataclass(frozen=True)
class Result:
    out: str
    err: str


def environment(path: Sequence[Path] = (), **extra: str) -> dict[str, str]:
    """The environment variables of this process without those that switch the patch, offline, with an import path."""
    kept = {name: value for name, value in os.environ.items() if name not in _SWITCHES}
    first = [*map(str, path), *filter(None, [kept.get("PYTHONPATH")])]
    return {**kept, "PYTHONPATH": os.pathsep.join(first), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **extra}


def fresh(
    *snippets: str, path: Sequence[Path] = (), flags: Sequence[str] = STRICT, timeout: float = 300, **extra: str
) -> Result:
    """Run the snippets one after the other. If they fail, the test fails with their output.

    Args:
        path: folders that come first on the import path.
        flags: of the interpreter; by default a `UserWarning` is an error.
        extra: environment variables.
    """
    code = "\n".join(map(textwrap.dedent, (_PRELUDE, *snippets)))
    with (
        tempfile.TemporaryDirectory() as elsewhere
    ):  # the working directory is on sys.path, and must not be the checkout
        done = subprocess.run(
            [sys.executable, *flags, "-c", code],
            env=environment(path, **extra),
            cwd=elsewhere,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return Result(done.stdout, done.stderr)
