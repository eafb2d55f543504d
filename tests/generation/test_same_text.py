"""A seeded model generates the same five windows of text on every version of transformers (`data/streams.json`).

`python -m tests.generation.test_same_text` writes the file with the installed transformers.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sink_patch import SinkCache
from tests.support.tiny import FAMILIES, tiny, tokens

TORCH = "2.13"  # another version may draw other random numbers
FILE = Path(__file__).parent.parent / "data" / "streams.json"
W, S = 12, 3
MODES = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 1.2, "top_k": 20, "top_p": 0.9},
}
MODELS = {"llama": {}, "mistral": {"sliding_window": 7}, "qwen2": {}, "gemma": {}, "glm": {}}


def stream_of(model_type: str, mode: str) -> list[int]:
    """Token ids of a stream, including the prompt."""
    model = tiny(model_type, layers=2, max_position_embeddings=48, **MODELS[model_type])
    torch.manual_seed(0)
    sink = {"cache_implementation": "sink", "window_length": W, "num_sink_tokens": S, "return_dict_in_generate": True}
    out = model.generate(tokens(5), max_new_tokens=5 * W, min_new_tokens=5 * W, **MODES[mode], **sink)
    assert isinstance(out.past_key_values, SinkCache)
    ids: list[int] = out.sequences[0].tolist()
    return ids


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model_type", MODELS)
def test_the_text_is_the_same_on_every_version(model_type, mode):
    assert model_type in FAMILIES
    if mode == "sampled" and not torch.__version__.startswith(f"{TORCH}."):
        pytest.skip(f"the file was written with torch {TORCH}, and this one draws other random numbers")
    assert stream_of(model_type, mode) == json.loads(FILE.read_text())[model_type][mode]


if __name__ == "__main__":
    streams = {model_type: {mode: stream_of(model_type, mode) for mode in MODES} for model_type in MODELS}
    FILE.write_text(json.dumps(streams) + "\n")
