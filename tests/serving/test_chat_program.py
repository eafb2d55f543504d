"""A long talk with the real programs: `sink-patch configure`, `transformers serve`, `transformers chat`, a terminal."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sink_patch import SinkCache
from tests.support import directory
from tests.support.chat_program import talk_in_a_terminal
from tests.support.fresh import environment
from tests.support.server import ROOT, needs_server, serving

pytestmark = [pytest.mark.slow, needs_server]
W, NEW, TURNS = 24, 20, 8
# <start> role words <end>: w1 w4 (the system), w1 w5 (the user), w1 w6 (the model), w2
TEMPLATE = (
    "{% for message in messages %}w1 {{ {'system': 'w4', 'user': 'w5', 'assistant': 'w6'}[message.role] }} "
    "{{ message.content }} w2 {% endfor %}{% if add_generation_prompt %}w1 w6{% endif %}"
)
SYSTEM = "w80 w81 w82"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model directory that `sink-patch configure` has been run on."""
    where = directory.write(tmp_path_factory.mktemp("model"))
    tokenizer = directory.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(where)
    asked = ["--window-length", str(W), "--keep-system", "--whole-turns", "--keep-streams", "4"]
    command = [sys.executable, "-m", "sink_patch.cli", "configure", str(where), *asked]
    done = subprocess.run(command, env=environment([ROOT]), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return where


@pytest.fixture(scope="module")
def url(folder, tmp_path_factory) -> Iterator[str]:
    with serving(folder, tmp_path_factory.mktemp("server")) as found:
        yield found


def words(turn: int) -> str:
    return " ".join(f"w{20 + (7 * turn + place) % 50}" for place in range(2 + turn % 3))


def ids_of(messages: list[dict[str, str]], tokenizer) -> torch.Tensor:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]


def replayed(folder: Path) -> list[str]:
    """What `generate` answers turn by turn, on one cache."""
    model, tokenizer = directory.model(), directory.tokenizer()
    tokenizer.chat_template = TEMPLATE
    settings = json.loads((folder / "generation_config.json").read_text())["cache_config"]
    cache = SinkCache(W, 6, evict="turns", turn_start=settings["turn_start"], model=model)
    messages, answers = [{"role": "system", "content": SYSTEM}], []
    for turn in range(TURNS):
        messages.append({"role": "user", "content": words(turn)})
        ids = ids_of(messages, tokenizer)
        made = model.generate(ids, past_key_values=cache, do_sample=False, max_new_tokens=NEW)
        answers.append(tokenizer.decode(made[0, ids.shape[1] :]))
        messages.append({"role": "assistant", "content": answers[-1]})
    assert cache.get_seq_length() > 6 * W
    return answers


def test_a_talk_over_many_windows_in_a_terminal(folder, url, tmp_path):
    said = [words(turn) for turn in range(TURNS)]
    saved = talk_in_a_terminal(folder, url, said, tmp_path, f"max_new_tokens={NEW}", "--system-prompt", SYSTEM)
    assert [message["content"] for message in saved if message["role"] == "assistant"] == replayed(folder)
