"""The command line with a tiny model and a tiny tokenizer: no network, no weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from sink_patch import cli
from tests.support.measured import failure, write_model

W, S = 12, 3


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


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


def test_eval_alone_prints_its_measures(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval"]) == 0
    out = capsys.readouterr().out
    assert all(measure in out for measure in ("perplexity", "cost", "streameval", "recall", "sinks", "plot"))


def test_families_prints_the_table_of_the_repository(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["families"]) == 0
    assert capsys.readouterr().out == (Path(__file__).parent.parent / "COVERAGE.md").read_text()
