"""Every snippet of the README runs, with a tiny model in place of the real one."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import transformers
from transformers import GenerationConfig

from tests.support.tiny import tiny
from tests.support.tokenizer import tiny_tokenizer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()

TEMPLATE = (
    "{% for message in messages %}word1 {{ {'system': 'word4', 'user': 'word5'}.get(message['role'], 'word6') }} "
    "{{ message['content'] }} word2 {% endfor %}{% if add_generation_prompt %}word1 word6 {% endif %}"
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def model():
    model = copy.deepcopy(tiny("qwen3", layers=2, vocab_size=300))
    model.generation_config.eos_token_id = None
    return model


def test_the_python_snippets_run_one_after_the_other(model, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer(chat_template=TEMPLATE)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: tokenizer)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: model)
    first, *others = blocks("python")
    names: dict = {"model": model, "inputs": {"input_ids": tokenizer("a cat", return_tensors="pt")["input_ids"]}}
    exec(first.replace("num_sink_tokens=4)", "num_sink_tokens=4, max_new_tokens=5)"), names)
    names = {}
    for snippet in others:
        exec(snippet, names)
    assert "seen=" in capsys.readouterr().out
    assert names["wave"].model_types == ("wave",)


def test_the_json_snippet_is_a_generation_config(model, tmp_path):
    (snippet,) = blocks("json")
    (tmp_path / "generation_config.json").write_text(json.dumps(json.loads(snippet)))
    model.generation_config = GenerationConfig.from_pretrained(tmp_path)
    out = model.generate(max_new_tokens=3, return_dict_in_generate=True, bos_token_id=1)
    assert out.past_key_values.window_length == 1024


def test_ci_runs_the_test_command():
    assert len(blocks("sh")) == 2
    marker = re.search(r"<!-- \.ci/run runs the next line -->\n```sh\n(.*)\n```", README)
    assert marker is not None
    assert marker.group(1).endswith(".venv/bin/python -m pytest")
    assert "<!-- .ci/run runs the next line -->" in (ROOT / ".ci" / "run").read_text()
