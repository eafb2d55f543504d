"""The command line with a tiny model and a tiny tokenizer: no network, no weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from sink_patch import cli
from tests.support.tokenizer import WORDS, tiny_tokenizer

W, S = 12, 3


def tiny_model(num_layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 3,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(autouse=True)
def restore_logging() -> Iterator[None]:
    """The commands silence transformers; other tests need its messages."""
    level = transformers_logging.get_verbosity()
    yield
    transformers_logging.set_verbosity(level)
    transformers_logging.enable_progress_bar()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model().save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return str(directory)


def window(length: int = W, sinks: int = S) -> list[str]:
    return ["--window-length", str(length), "--num-sink-tokens", str(sinks)]


# --- inspect --------------------------------------------------------------------------------------------------------


def test_inspect_prints_the_report(model_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", model_dir, *window(), "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert "LlamaForCausalLM" in out
    assert str(W) in out


def test_sizes_have_the_defaults_of_the_cache(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["inspect", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "(default: 256)" in out
    assert "(default: 4)" in out


# --- errors ---------------------------------------------------------------------------------------------------------


def failure(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("sink-patch: ")
    assert "Traceback" not in "".join(err)
    return err[-1]


def test_missing_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    assert "cannot be loaded" in failure(["inspect", str(tmp_path / "empty")], capsys)


def test_help_needs_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["demo", "--help"], ["inspect", "--help"]):
        with pytest.raises(SystemExit) as left:
            cli.main(arguments)
        assert left.value.code == 0
        assert "usage: sink-patch" in capsys.readouterr().out


def test_families_prints_the_table_of_the_repository(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["families"]) == 0
    assert capsys.readouterr().out == (Path(__file__).parent.parent / "COVERAGE.md").read_text()
