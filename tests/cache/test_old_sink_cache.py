"""The `SinkCache` that transformers had until 4.52, run in another process: ours equals it where it was right.

Fed token by token with positions clamped to W - 1, it equals the default cache below W tokens. At W it rotates the keys
of the first window back once too often; the last of them leaves the window W - S - 1 tokens later. In a second layer,
the keys computed from wrong states of the first layer have to leave, too, and so on.

    pip install --no-deps --target DIR "transformers==4.52.4" "tokenizers>=0.21,<0.22" "huggingface-hub<1.0"
    SINK_PATCH_OLD_TRANSFORMERS=DIR python -m pytest tests/cache/test_old_sink_cache.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from sink_patch import SinkCache
from tests.support.caches import default_cache
from tests.support.oracle import relative_error
from tests.support.tiny import tiny, tokens

OLD = os.environ.get("SINK_PATCH_OLD_TRANSFORMERS")
RUNNER = Path(__file__).parent.parent / "support" / "old_sink_cache.py"
TOLERANCE = 1e-5
CASES = [(layers, window, sinks) for window, sinks in ((12, 3), (24, 4), (16, 0)) for layers in (1, 2)]
IDS = [f"layers={layers}-W={window}-S={sinks}" for layers, window, sinks in CASES]
COPIED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("num_hidden_layers", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
)

pytestmark = pytest.mark.skipif(
    not OLD, reason="SINK_PATCH_OLD_TRANSFORMERS does not name a directory with transformers 4.52.4"
)


def exact_from(layers: int, window: int, sinks: int) -> int:
    """After how many tokens the old cache is right again; it is also right up to window - 1."""
    return window + layers * (window - sinks - 1)


def model_of(layers: int) -> PreTrainedModel:
    # a short context, so that our clock is set back more than once in each stream
    return tiny("llama", layers=layers, max_position_embeddings=48)


def stream_of(window: int) -> torch.Tensor:
    return tokens(10 * window, rows=2)


def write_job(directory: Path, layers: int, window: int, sinks: int) -> None:
    model = model_of(layers)
    config = {name: getattr(model.config, name) for name in COPIED}
    settings = model.config.to_dict()
    config["rope_theta"] = settings.get("rope_parameters", settings)["rope_theta"]
    job = {"config": config, "window_length": window, "num_sink_tokens": sinks}
    (directory / "job.json").write_text(json.dumps(job))
    torch.save(model.state_dict(), directory / "weights.pt")
    torch.save(stream_of(window), directory / "tokens.pt")


@pytest.fixture(scope="module")
def old_logits(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, torch.Tensor]:
    """Case -> logits [rows, tokens, vocab] of the old cache; all in one process, as starting one takes seconds."""
    directories = {case: tmp_path_factory.mktemp("old") for case in CASES}
    for case, directory in directories.items():
        write_job(directory, *case)
    # that process must use neither our patch nor the transformers of this one
    switched_off = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "SINK_PATCH_AUTOLOAD": "0", "PYTHONPATH": str(OLD)}
    command = [sys.executable, str(RUNNER), *map(str, directories.values())]
    done = subprocess.run(
        command, env={**os.environ, **switched_off}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return {case: torch.load(directory / "logits.pt") for case, directory in directories.items()}


@torch.no_grad()
def token_by_token(model: PreTrainedModel, cache: Cache, stream: torch.Tensor) -> torch.Tensor:
    """Logits [rows, tokens, vocab]."""
    logits = [model(column, past_key_values=cache).logits[:, -1] for column in stream.split(1, dim=1)]
    return torch.stack(logits, dim=1)


def errors(case: tuple[int, int, int], old: torch.Tensor) -> list[float]:
    """Relative error after 1, 2, ... tokens: ours against the old one's."""
    layers, window, sinks = case
    model = model_of(layers)
    ours = token_by_token(model, SinkCache(window, sinks, model=model), stream_of(window))
    return [relative_error(ours[:, index], old[:, index]) for index in range(ours.shape[1])]


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_ours_equals_the_old_cache_where_that_was_right(case, old_logits):
    _, window, _ = case
    found, right_again = errors(case, old_logits[case]), exact_from(*case)
    assert max(found[right_again - 1 :]) <= TOLERANCE
    # and it is wrong before: so the comparison can fail, and the old cache is right nowhere else
    assert min(found[window - 1 : right_again - 1]) > 10 * TOLERANCE


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_below_w_tokens_both_equal_the_default_cache(case, old_logits):
    layers, window, _ = case
    model = model_of(layers)
    below = stream_of(window)[:, : window - 1]
    default = token_by_token(model, default_cache(model), below)
    assert max(errors(case, old_logits[case])[: window - 1]) <= TOLERANCE
    assert relative_error(old_logits[case][:, : window - 1], default) <= TOLERANCE
