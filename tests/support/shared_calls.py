"""Calls of a model that one process makes, and two that share it make too: each returns tokens, and logits if any."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import CompileConfig, GenerationConfig

import sink_patch
from sink_patch import SinkCache
from tests.support.tiny import tiny
from tests.support.tokenizer import tiny_tokenizer

CONTEXT, W, S, NEW = 20, 8, 2, 20
"""Of the models; the window, its sinks, and new tokens: past the context."""
Outcome = tuple[torch.Tensor, torch.Tensor]
"""Ids [rows, columns], and logits [forwards, rows, vocabulary]."""

WHOLE = "whole.safetensors"
"""The file that one process saves."""

SINK = {"cache_implementation": "sink", "window_length": W, "num_sink_tokens": S}
_ASKED = {"do_sample": False, "max_new_tokens": NEW, "return_dict_in_generate": True, "output_logits": True}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 5,
        "tie_word_embeddings": False,  # 4.52 does not share a tied head among processes
    },
}


def make(name: str) -> Any:
    """The model of this name, whole."""
    return tiny(name, layers=2, attention="sdpa", max_position_embeddings=CONTEXT, **MODELS[name])


def write(name: str, directory: Path) -> None:
    """The model of this name and a tokenizer, for `from_pretrained`."""
    copy.deepcopy(make(name)).save_pretrained(directory)  # it writes into the config
    tiny_tokenizer().save_pretrained(directory)


def of_the_readme(directory: Path) -> torch.Tensor:
    """The ids that the script of the README of doors/ makes of the model in a directory, [1, columns]."""
    text = Path("sink_patch/doors/README.md").read_text()
    script = re.search(r"This is `story.py`:\n\n```python\n(.*?)```", text, flags=re.DOTALL)
    assert script is not None
    code = script.group(1).replace('"pirate"', repr(str(directory))).replace("100", "20")
    names: dict[str, Any] = {}
    exec(code, names)
    ids: torch.Tensor = names["out"]
    return ids


def _ids(rows: int = 1, count: int = 7) -> torch.Tensor:
    return torch.randint(3, 63, (rows, count), generator=torch.Generator().manual_seed(rows))


def _made(model: Any, ids: torch.Tensor, **asked: Any) -> Any:
    out = model.generate(ids, **{**_ASKED, **asked})
    assert type(out.past_key_values) is SinkCache
    return out


def _of(out: Any) -> Outcome:
    return out.sequences, torch.stack(out.logits)


def _padded_beams(model: Any, _path: str) -> Outcome:
    padding = torch.ones(2, 7, dtype=torch.long)
    padding[0, :3] = 0
    return _of(_made(model, _ids(rows=2), attention_mask=padding, num_beams=2, **SINK))


def _saved_and_loaded(model: Any, path: str) -> Outcome:
    """A text goes on in a cache that was saved and loaded."""
    first = _made(model, _ids(), **SINK)
    first.past_key_values.save(path)
    more = torch.cat((first.sequences, _ids(rows=2)[:1]), dim=1)
    return _of(_made(model, more, past_key_values=SinkCache.load(path, model=model), max_new_tokens=5))


def _looked_up(model: Any, _path: str) -> Outcome:
    ids = _ids(count=3).repeat(1, 3)
    settings = GenerationConfig(**{**_ASKED, **SINK}, prompt_lookup_num_tokens=2, eos_token_id=96)  # 4.52 asks for one
    return _of(model.generate(ids, generation_config=settings))


def _drafted(model: Any, _path: str) -> Outcome:
    """Each process has all of the assistant."""
    assistant = tiny("llama", layers=1, attention="sdpa", max_position_embeddings=CONTEXT)
    return _of(_made(model, _ids(), assistant_model=assistant, **SINK))


def _sampled(model: Any, _path: str) -> Outcome:
    torch.manual_seed(7)
    return _of(_made(model, _ids(rows=2), do_sample=True, **SINK))


def _whole_messages(model: Any, _path: str) -> Outcome:
    torch.manual_seed(7)
    starts = [[token] for token in range(0, 97, 4)]
    return _of(_made(model, _ids(), do_sample=True, evict="turns", turn_start=starts, **SINK))


def _kept(model: Any, _path: str) -> Outcome:
    """Two turns that ask for kept streams."""
    first = _made(model, _ids(), keep_streams=2, **SINK | {"window_length": CONTEXT - 2}, max_new_tokens=5)
    more = torch.cat((first.sequences, _ids(rows=2)[:1, :3]), dim=1)
    second = _made(model, more, keep_streams=2, **SINK | {"window_length": CONTEXT - 2}, max_new_tokens=3)
    sink_patch.kept_streams.clear(model)  # other tests share the whole one
    return _of(second)


def _streamed(model: Any, _path: str) -> Outcome:
    tokenizer = tiny_tokenizer()
    text = " ".join(f"word{number}" for number in _ids()[0].tolist())
    stream = sink_patch.stream(model, tokenizer, text, window_length=W, num_sink_tokens=S, do_sample=False)
    pieces = list(itertools.islice(stream, NEW))
    return torch.tensor([list("".join(pieces).encode())]), torch.zeros(0)


def _compiled(model: Any, path: str) -> Outcome:
    """One process need not compile it."""
    if Path(path).name == WHOLE:
        return _of(_made(model, _ids(), **SINK))
    config = CompileConfig(backend="eager", mode=None, fullgraph=True, dynamic=False)
    config._compile_all_devices = True  # else on GPUs only
    return _of(_made(model, _ids(), compile_config=config, **SINK))


def _two_kinds(model: Any, _path: str) -> Outcome:
    padding = torch.ones(2, 7, dtype=torch.long)
    padding[0, :3] = 0
    return _of(_made(model, _ids(rows=2), attention_mask=padding, **SINK))


CALLS: dict[str, tuple[str, Callable[[Any, str], Outcome]]] = {
    "padded rows, beams": ("llama", _padded_beams),
    "saved and loaded": ("llama", _saved_and_loaded),
    "prompt lookup": ("llama", _looked_up),
    "assistant model": ("llama", _drafted),
    "sampled": ("llama", _sampled),
    "whole messages leave": ("llama", _whole_messages),
    "kept streams": ("llama", _kept),
    "streamed": ("llama", _streamed),
    "compiled": ("llama", _compiled),
    "two kinds of layers": ("gemma3_text", _two_kinds),
}
"""The name of the model, and what is done with it and the path of a file."""
