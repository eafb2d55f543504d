"""A directory for `custom_generate=DIR`, or to be uploaded: the sink cache as a generation method of transformers."""

from __future__ import annotations

from pathlib import Path

import sink_patch
from sink_patch.errors import SinkArgumentError
from sink_patch.evaluate.options import Commands

_GENERATE = '''\
"""`model.generate(..., custom_generate=...)` with the attention-sink cache of sink_patch (pip install sink-patch)."""

from __future__ import annotations

import sink_patch

_OF_THE_CALL = ("self", "custom_generate", "trust_remote_code", "global_keys_to_exclude")


def generate(*inputs, model, **kwargs):
    """`generate` with a sink cache.

    Args:
        inputs: of `generate`.
        model: of transformers.
        kwargs: all other arguments of `generate`; `window_length` (256) and `num_sink_tokens` (4) among them.
    """
    sink_patch.patch()
    kwargs = {name: value for name, value in kwargs.items() if name not in _OF_THE_CALL}
    if not any(isinstance(value, sink_patch.SinkCache) for value in kwargs.values()):
        if kwargs.get("cache_implementation") not in (None, "sink"):
            raise ValueError("This is the sink cache: leave cache_implementation out.")
        kwargs["cache_implementation"] = "sink"
    return type(model).generate(model, *inputs, **kwargs)
'''
_README = """\
---
library_name: transformers
tags:
- custom_generate
---

# Attention sinks

Generates without end at constant memory: the first few tokens (the sinks) and a window of the newest ones are kept
(StreamingLLM, arXiv 2309.17453). All is done by the package `sink-patch`, which must be installed.

```python
out = model.generate(
    **inputs,
    custom_generate="{name}",  # this directory, or the repository to which it was uploaded
    trust_remote_code=True,
    window_length=1024,
    num_sink_tokens=4,
)
```

| argument | default | meaning |
| --- | --- | --- |
| `window_length` | 256 | tokens that are kept, sinks counted in |
| `num_sink_tokens` | 4 | how many of the first tokens are kept for good |

With `return_dict_in_generate=True`, `past_key_values` is a `sink_patch.SinkCache`. Most decoder-only models are
served; others are refused by name.
"""


def add(commands: Commands) -> None:
    """Add the command."""
    export = commands.add_parser(
        "export-custom-generate",
        help="write a directory for generate(custom_generate=DIR)",
        description="Writes custom_generate/generate.py, its requirements.txt and a README.md, for "
        "generate(custom_generate=DIR, trust_remote_code=True) or to be uploaded to a hub. It needs sink-patch to be "
        "installed where it is used.",
    )
    export.add_argument("directory", type=Path, metavar="DIR", help="where to write it")
    export.set_defaults(run=lambda arguments: print(*custom_generate(arguments.directory), sep="\n"))


def custom_generate(directory: Path) -> list[Path]:
    """Write the files of a `custom_generate` repository; those that are there are written anew.

    Returns:
        Their paths.

    Raises:
        SinkArgumentError: it is no directory, and cannot be made one.
    """
    texts = {
        directory / "custom_generate" / "generate.py": _GENERATE,
        directory / "custom_generate" / "requirements.txt": f"sink-patch>={sink_patch.__version__}\n",
        directory / "README.md": _README.replace("{name}", directory.name),
    }
    try:
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    except OSError as failure:
        raise SinkArgumentError(
            f"{directory} cannot be written: {failure}. Name a directory that is there, or that can be made."
        ) from failure
    return list(texts)
