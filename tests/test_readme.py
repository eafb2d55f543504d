"""Every README: its snippets run, with a tiny model in place of the real one; its commands and links are there."""

from __future__ import annotations

import copy
import functools
import json
import re
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import GenerationConfig

from sink_patch import cli
from sink_patch.compat import installed_shim
from tests.support.tiny import tiny
from tests.support.tokenizer import tiny_tokenizer

ROOT = Path(__file__).parent.parent
FOUND = [
    ROOT / "README.md",
    *(file for top in ("sink_patch", "compat", "tests") for file in (ROOT / top).rglob("*.md")),
]
READMES = {file.relative_to(ROOT).as_posix(): file.read_text() for file in FOUND if not file.parent.is_symlink()}
README = READMES["README.md"]
AT_MOST = 150
"""Lines of the README and of the map."""

TEMPLATE = (
    "{% for message in messages %}word1 {{ {'system': 'word4', 'user': 'word5'}.get(message['role'], 'word6') }} "
    "{{ message['content'] }} word2 {% endfor %}{% if add_generation_prompt %}word1 word6 {% endif %}"
)
NEW = 60
MESSAGES = [
    {"role": "system", "content": "You are a pirate."},
    {"role": "user", "content": "Tell me a story about a cat."},
]


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def model():
    model = copy.deepcopy(tiny("qwen3", layers=2, vocab_size=300))
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def names(model, monkeypatch, tmp_path) -> dict[str, Any]:
    """What the first snippet of the README leaves to the others, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(chat_template=TEMPLATE)
    inputs = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    return {"model": model, "tokenizer": tokenizer, "messages": MESSAGES, "inputs": inputs}


@pytest.fixture
def libraries(monkeypatch) -> None:
    """A stand-in for each library that is not installed: what the snippets use of it, and no more."""
    for name, made in {"gradio": gradio(), "langchain_huggingface": langchain_huggingface()}.items():
        if find_spec(name) is None:
            print(f"{name} is not installed: a stand-in")
            monkeypatch.setitem(sys.modules, name, made)


def gradio() -> ModuleType:
    module = ModuleType("gradio")
    module.ChatInterface = lambda fn: SimpleNamespace(fn=fn)
    return module


def langchain_huggingface() -> ModuleType:
    """A chat model of 1.2 formats the messages by the template, and calls the pipeline with one text in a list."""
    module = ModuleType("langchain_huggingface")
    roles = {"system": "system", "human": "user", "ai": "assistant"}

    def invoke(llm, said, skip_prompt=False):
        chat = [{"role": roles[role], "content": content} for role, content in said]
        text = llm.pipeline.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ((answer,),) = llm.pipeline([text])
        return SimpleNamespace(content=answer["generated_text"][len(text) if skip_prompt else 0 :])

    module.HuggingFacePipeline = SimpleNamespace
    module.ChatHuggingFace = lambda llm: SimpleNamespace(invoke=functools.partial(invoke, llm))
    return module


def run(text: str, names: dict[str, Any]) -> None:
    """The snippets, one after the other, with fewer tokens: a window of 50 is still too short for them."""
    for snippet in blocks("python", text):
        exec(re.sub(r"\b(100|300)\b", str(NEW), snippet), names)


def test_the_readme(names, monkeypatch, capsys):
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda _name: names["tokenizer"])
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda _name: names["model"])
    first = blocks("python")[0]
    exec(first.replace("num_sink_tokens=4)", "num_sink_tokens=4, max_new_tokens=5)"), dict(names))
    of_the_readme: dict[str, Any] = {}
    run(README.replace(first, ""), of_the_readme)
    assert of_the_readme["cache"].get_seq_length() == names["inputs"]["input_ids"].shape[1]
    assert len(of_the_readme["out"][0]) == names["inputs"]["input_ids"].shape[1] + NEW
    assert capsys.readouterr().out


def test_calls_of_generate(names, capsys):
    names["model"].generation_config.eos_token_id = 299  # 4.52 looks nothing up in the prompt of a model that has none
    run(READMES["sink_patch/generation/README.md"], names)
    assert "0 kept streams" not in capsys.readouterr().out
    assert names["stream"].cache.evict == "tokens"


def test_a_cache_of_your_own(names, capsys):
    run(READMES["sink_patch/cache/README.md"], names)
    assert "seen=" in capsys.readouterr().out
    assert names["another"].get_seq_length() == names["inputs"]["input_ids"].shape[1] + 2
    assert {number: len(tokens) for number, tokens in names["said"].items()} == {n: NEW - 9 * n for n in range(6)}


def test_models(names, capsys):
    run(READMES["sink_patch/models/README.md"], names)
    assert names["wave"].model_types == ("wave",)
    assert "qwen3" in capsys.readouterr().out


@pytest.mark.skipif(not installed_shim().batching, reason="its paged cache takes no sinks")
def test_many_requests(names):
    run(READMES["sink_patch/batching/README.md"], names)
    assert [len(output.generated_tokens) for output in names["outputs"].values()] == [NEW, NEW]


@pytest.fixture
def one_device(monkeypatch) -> list[str]:
    """Loads a model whole where it is to lie on several devices: what was asked for, in a list."""
    load, asked = transformers.AutoModelForCausalLM.from_pretrained, []

    def loaded(name, **given):
        asked.extend(sorted({"tp_plan", "device_map"} & {key for key, value in given.items() if value == "auto"}))
        return load(name, **{key: value for key, value in given.items() if key not in asked})

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", loaded)
    return asked


def test_pipelines_and_other_libraries(names, libraries, one_device):
    run(READMES["sink_patch/doors/README.md"], names)
    assert one_device == ["tp_plan", "device_map"]  # with two processes: tests/serving/test_distributed.py
    assert len(names["out"][0]) == 4 + NEW
    assert [message["role"] for message in names["messages"]] == ["system", "user", *["user", "assistant"] * 2]
    assert not names["reply"].content.startswith("word1 word4")  # the prompt is not in it
    history = [{"role": "user", "content": "word3"}, {"role": "assistant", "content": "word8 word9"}]
    parts = [{"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]} for turn in history]
    answers = []
    for said in (history, parts, []):
        torch.manual_seed(0)
        answers.append(list(names["app"].fn("word5", said))[-1])
    assert answers[0] == answers[1] != answers[2]
    assert len(answers[0].split()) <= 20


def test_each_python_snippet_is_in_a_readme_that_runs():
    tested = {
        "README.md",
        *(f"sink_patch/{room}/README.md" for room in ("generation", "cache", "models", "batching", "doors")),
    }
    assert {name for name, text in READMES.items() if blocks("python", text)} == tested


@pytest.mark.parametrize("name", [name for name, text in READMES.items() if blocks("json", text)])
def test_json_is_a_generation_config(name, model, tmp_path):
    (snippet,) = blocks("json", READMES[name])
    (tmp_path / "generation_config.json").write_text(json.dumps(json.loads(snippet)))
    model.generation_config = GenerationConfig.from_pretrained(tmp_path)
    out = model.generate(max_new_tokens=3, return_dict_in_generate=True, bos_token_id=1)
    assert out.past_key_values.window_length == 1024


def commands(text: str) -> list[list[str]]:
    """What `sink-patch` is called with in blocks of commands."""
    lines = [line for language in ("sh", "console") for block in blocks(language, text) for line in block.splitlines()]
    found = [re.search(r"(?:^|/|^\$ )sink-patch (.*)$", line) for line in lines]
    return [shlex.split(match.group(1)) for match in found if match]


@pytest.mark.parametrize("name", READMES)
def test_each_command_is_one_of_sink_patch(name):
    for command in commands(READMES[name]):
        cli._parser().parse_args(command)


@pytest.mark.parametrize("name", READMES)
def test_each_module_that_is_to_be_run_is_there(name):
    for module in re.findall(r"python -m (tests[\w.]*)", READMES[name]):
        assert find_spec(module) is not None


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", READMES)
def test_each_link_leads_to_something(name):
    for link in re.findall(r"\]\(([^)]+)\)", READMES[name]):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            file = ((ROOT / name).parent / path).resolve()
            assert file.exists(), link
            assert not anchor or anchor in anchors(file.read_text()), link


@pytest.mark.parametrize("name", ["README.md", "sink_patch/README.md"])
def test_they_stay_short(name):
    assert len(READMES[name].splitlines()) <= AT_MOST


def test_all_are_found_from_the_first():
    """By links, one after the other."""
    seen, next_ones = set(), {"README.md"}
    while next_ones:
        name = next_ones.pop()
        seen.add(name)
        linked = {link.partition("#")[0] for link in re.findall(r"\]\(([^)]+\.md[^)]*)\)", READMES.get(name, ""))}
        paths = {((ROOT / name).parent / link).resolve().relative_to(ROOT).as_posix() for link in linked}
        next_ones |= paths - seen
    assert set(READMES) <= seen


def test_ci_runs_the_test_command():
    assert len(blocks("sh")) == 2
    marker = re.search(r"<!-- \.ci/run runs the next line -->\n```sh\n(.*)\n```", README)
    assert marker is not None
    assert marker.group(1).endswith(".venv/bin/python -m pytest")
    assert "<!-- .ci/run runs the next line -->" in (ROOT / ".ci" / "run").read_text()
