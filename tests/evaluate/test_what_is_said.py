"""What the commands say of files that are damaged, empty or of something else, and of arguments without effect."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sink_patch import SinkArgumentError, cli
from sink_patch.evaluate import models
from sink_patch.evaluate.chat import picture, program
from sink_patch.evaluate.demo import screens, story
from sink_patch.evaluate.measures import records
from tests.evaluate.test_chat import conversation
from tests.support import directory
from tests.support.fresh import environment
from tests.support.measured import failure, write_model
from tests.support.server import ROOT

KINDS = ".png, .svg or .pdf"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("a model was loaded"))


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text("some words")
    return str(tmp_path / "text.txt")


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0.5, 0.0])
def test_weights_that_are_cut_short(kept: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path / "tiny")
    file = Path(model) / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
    said = failure(["inspect", model], capsys)
    assert said.startswith(f"sink-patch: The model {model!r} cannot be loaded: ")
    assert said.endswith(". Its weights are damaged or cut short. Download it again.")
    assert ".." not in said


def test_a_reason_has_one_full_stop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    said = [failure([command, str(tmp_path)], capsys) for command in ("inspect", "chat")]
    assert all(". Give a directory" in one and ".. Give" not in one for one in said)


# --- the files of measures --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("never_loaded")
@pytest.mark.parametrize("content", ["my diary", "", '{"measure": "perplexity"}', '{"measure": ["cost"]}', "[]"])
@pytest.mark.parametrize("measure", ["cost", "streameval", "recall", "sinks"])
def test_a_file_of_something_else_is_not_written_over(
    measure: str, content: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "p.json"
    file.write_text(content)
    asked = [*(["--text", text] if measure == "sinks" else []), "--json", str(file)]
    assert failure(["eval", measure, "no/model", *asked], capsys) == (
        f"sink-patch: {file} is there already and was not written by `sink-patch eval {measure}`. Give another name, "
        "or delete it."
    )
    assert file.read_text() == content


@pytest.mark.parametrize(
    ("command", "measure"),
    [("cost", "cost"), ("streameval", "streameval"), ("streameval", "questions"), ("sinks", "sinks")],
)
def test_a_record_of_the_same_measure_may_be_written_again(command: str, measure: str, tmp_path: Path) -> None:
    records.check_own(None, command)
    records.check_own(tmp_path / "new.json", command)
    records.write(tmp_path / "p.json", {"measure": measure})
    records.check_own(tmp_path / "p.json", command)


@pytest.mark.usefixtures("never_loaded")
@pytest.mark.parametrize("measure", ["perplexity", "sinks"])
def test_an_empty_text(measure: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").touch()
    said = failure(["eval", measure, "no/model", "--text", str(tmp_path / "text.txt")], capsys)
    assert said == f"sink-patch: The text {tmp_path / 'text.txt'} is empty. Give a UTF-8 file with a text in it."


@pytest.mark.usefixtures("never_loaded")
@pytest.mark.parametrize("count", ["-1", "-2", "-30"])
def test_a_negative_number_of_messages(count: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = failure(["eval", "recall", "no/model", "--dense-messages", count], capsys)
    assert said == f"sink-patch: dense_messages={count} is negative. Give 0 (none) or more."


# --- the demo, configure, pictures ------------------------------------------------------------------------------------


def test_a_demo_that_is_stopped_at_once_does_not_ask_for_more(capsys: pytest.CaptureFixture[str]) -> None:
    class Stopping(screens.Plain):
        def text(self, piece: str) -> None:
            signal.raise_signal(signal.SIGINT)

    loaded = models.Loaded("tiny", directory.model(), directory.tokenizer())
    with pytest.raises(KeyboardInterrupt):
        story.tell(loaded, story.Settings(12, 3, 60, "w3"), Stopping(sys.stdout))
    out = capsys.readouterr().out
    assert "Stopped before anything left the window." in out
    assert "--max-new-tokens" not in out


@pytest.mark.parametrize(
    "asked",
    [
        ["--window-length", "5"],
        ["--num-sink-tokens", "5"],
        ["--keep-system"],
        ["--whole-turns"],
        ["--keep-streams", "2"],
    ],
)
def test_remove_takes_no_settings(asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = directory.write(tmp_path / "tiny")
    assert cli.main(["configure", str(folder)]) == 0
    before = (folder / "generation_config.json").read_text()
    said = failure(["configure", str(folder), "--remove", *asked], capsys)
    assert said.endswith(f"and takes no {asked[0]}. Leave one of the two out.")
    assert (folder / "generation_config.json").read_text() == before
    assert cli.main(["configure", str(folder), "--remove"]) == 0


@pytest.mark.parametrize(
    "command",
    [["demo"], ["eval", "plot"], *(["eval", one] for one in ("perplexity", "cost", "streameval", "recall", "sinks"))],
)
def test_the_kinds_of_pictures_in_the_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([*command, "--help"])
    assert f"a {KINDS}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("never_loaded")
def test_the_kinds_of_pictures_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert KINDS in program.HELP
    assert f"ends in {KINDS}." in failure(["eval", "cost", "no/model", "--plot", "a.txt"], capsys)
    pytest.importorskip("matplotlib")
    with pytest.raises(SinkArgumentError, match=KINDS):
        picture.draw(tmp_path / "a.tale", conversation())


@pytest.mark.usefixtures("never_loaded")
@pytest.mark.parametrize("asked", [["chat", "a/model", "--system"], ["demo", "a/model", "--prompt"]])
def test_a_text_that_is_not_utf8(asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    said = failure([*asked, "w5 \udcff"], capsys)
    assert said == f"sink-patch: The text of {asked[2]} is not UTF-8. Check the encoding of your terminal."


# --- where nothing can be written -------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="of Linux")
@pytest.mark.parametrize("asked", [["inspect"], ["eval", "cost", "--windows", "1", "--window-length", "16"]])
def test_a_full_disk(model_dir: str, asked: list[str]) -> None:
    command: list[Any] = [sys.executable, "-m", "sink_patch.cli", *asked, model_dir]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment([ROOT]), check=False
        )
    assert done.returncode == 1
    said = "sink-patch: Not all could be written: No space left on device. Write to another place.\n"
    assert done.stderr.endswith(said)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
