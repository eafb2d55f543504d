"""A wrong MODEL says so before a model is loaded or a hub asked, and `sink-patch` alone prints its commands."""

from __future__ import annotations

from pathlib import Path

import pytest

import sink_patch
from sink_patch import cli
from sink_patch.evaluate import models
from sink_patch.evaluate.paths import model_source


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder to be in, with a model, an empty folder and a file; nothing is loaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("model", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "file.gguf").write_text("")

    def loads(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(models, "_from_pretrained", loads)
    return tmp_path


WRONG = {
    **dict.fromkeys(("./none", "../none", "~/none", "/none/there", "a/b/c", "none/", "a\\b", "."), "no such directory"),
    "empty": "no config.json",
    ".": "no config.json",
    "file.gguf": "is a file",
}


@pytest.mark.parametrize("model", WRONG)
@pytest.mark.parametrize("command", [["inspect"], ["demo"]])
def test_a_path_where_no_model_is(command, model, here, capsys):
    assert cli.main([*command, model]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"sink-patch: The model {model!r} cannot be loaded: ")
    assert WRONG[model] in said
    assert said.endswith("or a name on the Hugging Face hub.\n")


@pytest.mark.parametrize("model", ["gpt2", "Qwen/Qwen3-0.6B", "owner/.name"])
def test_a_name_on_the_hub_is_left_alone(model, here):
    assert model_source(model) == model


def test_directories_that_are_there(here):
    assert model_source("model") == "model"
    assert model_source("~/model") == str(here / "model")
    assert model_source(str(here / "model")) == str(here / "model")


def test_alone_it_prints_its_commands(capsys):
    assert cli.main([]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: sink-patch ")
    assert "configure" in printed


def test_its_version(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"sink-patch {sink_patch.__version__}\n"
