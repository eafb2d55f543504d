"""`sink-patch eval perplexity`: each way of reading against plain forwards, and a run that goes on where it stopped."""

from __future__ import annotations

import json
import logging
import math
import os
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import sink_patch
from sink_patch import cli
from sink_patch.evaluate import models
from sink_patch.evaluate.measures.perplexity import figures, masked, run, scoring
from sink_patch.evaluate.measures.perplexity.plan import WAYS, Plan
from tests.support.measured import TEXT, failure, tiny_model, write_model
from tests.support.tiny import VOCAB, tiny, tokens

W, S = 12, 3
NAMES = ["dense", "recomputed", "3 sinks", "window, no sinks", "3 sinks, positions of the text"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    file = tmp_path / "book.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


@pytest.fixture
def command(model_dir: str, text_file: Path) -> Callable[..., list[str]]:
    def arguments(*more: str, model: str = model_dir, text: Path = text_file) -> list[str]:
        sizes = ["--window-length", str(W), "--num-sink-tokens", str(S)]
        return ["eval", "perplexity", model, "--text", str(text), *sizes, "--tokens", "102", "--every", "3", *more]

    return arguments


@pytest.fixture
def never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_arguments: Any) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr(models, "load", load)


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    return {**record, "rows": [{**row, "seconds": 0} for row in record["rows"]]}


# --- the scores -------------------------------------------------------------------------------------------------------


def reading(model: Any, ids: torch.Tensor, every: int = 3) -> scoring.Reading:
    return scoring.Reading(model, ids, range(W, len(ids) - 1, every), W)


def scores(way: scoring.Way) -> list[float]:
    """Of a way that reads all in its own pieces."""
    found: list[float] = []
    read, end = 0, way.reading.positions[-1] + 1
    while read < end:
        stop = way.piece(read, end)
        found += way.read(read, stop).tolist()
        read = stop
    return found


def by_hand(model: Any, ids: torch.Tensor, seen: list[int], target: int) -> float:
    """The score of one position by a plain forward over the tokens at `seen`."""
    logits = model(ids[seen][None]).logits[0, -1]
    return float(-logits.log_softmax(-1)[ids[target]])


@torch.no_grad()
def test_scores_equal_those_of_plain_forwards_over_the_visible_tokens() -> None:
    """With one layer a key depends on its own token alone, so that each way of reading has an oracle."""
    model, ids = tiny_model(num_layers=1), torch.arange(70) * 7 % 60 + 3
    one = reading(model, ids)
    for sinks in (0, S):
        expected = [
            by_hand(model, ids, [*range(sinks), *range(p + 1 - W + sinks, p + 1)], p + 1) for p in one.positions
        ]
        assert scores(scoring.Streamed(one, sinks)) == pytest.approx(expected, rel=1e-4)
    expected = [by_hand(model, ids, list(range(p + 1 - W, p + 1)), p + 1) for p in one.positions]
    assert scores(scoring.Recomputed(one)) == pytest.approx(expected, rel=1e-4)
    assert scores(masked.Masked(one, 0)) == pytest.approx(expected, rel=1e-4)
    expected = [by_hand(model, ids, [0, *range(p + 2 - W, p + 1)], p + 1) for p in one.positions]
    assert scores(scoring.Recomputed(one, bos=int(ids[0]))) == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_dense_is_one_forward_over_the_whole_text() -> None:
    model, ids = tiny_model(), torch.arange(70) * 7 % 60 + 3
    one = scoring.Dense(reading(model, ids))
    one.step = 20
    logits = model(ids[None]).logits[0].log_softmax(-1)
    assert scores(one) == pytest.approx([float(-logits[p, ids[p + 1]]) for p in one.reading.positions], rel=1e-4)
    assert one.nbytes == 2 * 2 * 67 * 16 * 4  # layers, keys and values, tokens, head_dim, bytes


@torch.no_grad()
@pytest.mark.parametrize("step", [5, 256])
def test_a_mask_in_pieces_equals_a_stream_without_sinks(step: int) -> None:
    """With many layers, as only distances matter; with sinks the distance to them grows."""
    one = reading(tiny_model(), torch.arange(60) * 7 % 60 + 3)
    window, with_sinks = masked.Masked(one, 0), masked.Masked(one, S)
    window.step = with_sinks.step = step
    assert scores(window) == pytest.approx(scores(scoring.Streamed(one, 0)), rel=1e-4)
    assert scores(with_sinks) != pytest.approx(scores(scoring.Streamed(one, S)), rel=0.01)


@torch.no_grad()
def test_positions_of_the_text_by_a_plain_forward() -> None:
    model, ids = tiny_model(num_layers=1), torch.arange(50) * 7 % 60 + 3
    one = masked.Masked(reading(model, ids), S)
    one.step = 9
    for score, p in zip(scores(one), one.reading.positions, strict=True):
        seen = [*range(S), *range(p + 1 - W + S, p + 1)]
        logits = model(ids[seen][None], position_ids=torch.tensor([seen]), past_key_values=DynamicCache()).logits[0, -1]
        assert score == pytest.approx(float(-logits.log_softmax(-1)[ids[p + 1]]), rel=1e-4)


@torch.no_grad()
def test_a_model_with_shorter_windows_of_its_own_is_not_read_by_a_mask() -> None:
    plain, local = tiny("llama", layers=2), tiny("mistral", layers=2, sliding_window=7)
    ids = tokens(120)[0]
    assert masked.disagreement(reading(plain, ids)) is None
    assert "nats from those of a stream" in str(masked.disagreement(reading(local, ids)))
    assert max(ids) < VOCAB


@torch.no_grad()
def test_a_model_that_changes_with_the_length_is_not_read_by_a_mask() -> None:
    """Its trial is at the last positions of the text, where it would differ."""
    scaled = tiny("llama", layers=2, rope_scaling={"rope_type": "dynamic", "factor": 4.0}, max_position_embeddings=64)
    ids = tokens(300)[0]
    assert masked.disagreement(reading(scaled, ids)) is not None
    assert masked.disagreement(reading(scaled, ids[:60])) is None


# --- the command ------------------------------------------------------------------------------------------------------


def test_table_record_and_progress(
    command: Callable[..., list[str]], tmp_path: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    assert cli.main(command("--json", str(file), "--dense-tokens", "70")) == 0
    out, err = capsys.readouterr()
    found = read(file)
    assert [row["way"] for row in found["rows"]] == list(WAYS)
    assert [row["name"] for row in found["rows"]] == NAMES
    assert all(name in out for name in NAMES)
    assert (found["model"], found["tokens"], found["window_length"]) == ("tiny", 102, W)
    assert found["scored_positions"] == len(range(W, 101, 3))
    assert found["done"]
    assert [row["ratio"] for row in found["rows"] if row["way"] == "recomputed"] == [1.0]
    assert found["versions"]["sink_patch"] == sink_patch.__version__
    for place in (str(tmp_path), model_dir):
        assert place not in file.read_text(encoding="utf-8")
    for row in found["rows"]:
        assert row["perplexity"] == pytest.approx(math.exp(statistics.fmean(row["scores"])), rel=1e-4)
    dense = found["rows"][0]
    assert len(dense["scores"]) == len(range(W, 69, 3))
    assert "stopped after 67 tokens, where its cache holds" in dense["note"]
    assert dense["note"] in out
    assert sorted(tmp_path.glob("figures.json*")) == [file]

    bars = [line.rpartition("\r")[2] for line in err.split("\n") if "%|" in line]  # the last state of each
    assert sorted(bar.partition(": ")[0] for bar in bars) == sorted(NAMES)
    assert all("100%" in bar for bar in bars)
    assert "%" not in out


class _StopError(Exception):
    """As a crash, at a place that the test chooses."""


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_was_stopped_goes_on_to_the_same_figures(
    way: str, command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after each second piece, again and again; no piece is scored twice."""
    monkeypatch.setattr(scoring.Way, "step", 16)
    monkeypatch.setattr(scoring.Streamed, "step", 16)
    monkeypatch.setattr(masked, "_TOKENS_OF_THE_TRIAL", 3)
    whole, file = tmp_path / "whole.json", tmp_path / "parts.json"
    assert cli.main(command("--ways", way, "--json", str(whole))) == 0

    monkeypatch.setattr(run, "SAVE_SECONDS", 0.0)
    kind = {"recomputed": scoring.Recomputed, "dense": scoring.Dense, "sinks": scoring.Streamed}.get(way, masked.Masked)
    plain, counts = kind.read, {"pieces": 0, "stops": 0}

    def read_or_stop(self: Any, start: int, stop: int) -> torch.Tensor:
        if self.reading.ids.shape[0] == 102 and len(self.reading.positions) > 20:  # not the trial of masks
            counts["pieces"] += 1
            if counts["pieces"] % 3 == 0:
                counts["stops"] += 1
                raise _StopError
        return plain(self, start, stop)

    monkeypatch.setattr(kind, "read", read_or_stop)
    while True:
        try:
            assert cli.main(command("--ways", way, "--json", str(file))) == 0
            break
        except _StopError:
            partial = read(file)
            assert not partial["done"]
            (tmp_path / f"parts.json.{way}-7.safetensors").touch()  # as after a crash between two files
            assert 0 < partial["rows"][0]["read"] < 100
    assert counts["stops"] >= 2
    assert without_times(read(file)) == without_times(read(whole))
    assert sorted(tmp_path.glob("parts.json*")) == [file]


def test_stopping_by_hand_says_how_to_go_on_and_ways_are_added(
    command: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "figures.json"
    assert cli.main(command("--ways", "window", "--json", str(file))) == 0
    with monkeypatch.context() as patched:
        patched.setattr(scoring.Recomputed, "read", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cli.main(command("--ways", "recomputed,window", "--json", str(file))) == 130
    assert f"{file} keeps what was read. The same command goes on from there." in capsys.readouterr().err
    assert cli.main(command("--ways", "recomputed", "--json", str(file))) == 0
    assert [(row["way"], row["done"]) for row in read(file)["rows"]] == [("recomputed", True), ("window", True)]
    before = file.read_text(encoding="utf-8")
    assert cli.main(command("--ways", "recomputed,window", "--json", str(file))) == 0  # nothing is left to do
    assert file.read_text(encoding="utf-8") == before


@pytest.mark.filterwarnings("error:.*past_key_values. is deprecated")  # which is ignored in all other tests
def test_no_deprecated_name_of_the_cache_is_used(
    command: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[str] = []  # transformers logs some deprecations, once in a process
    monkeypatch.setattr(
        logging.Logger, "warning_once", lambda _self, message, *_args, **_kwargs: logged.append(message)
    )
    assert cli.main(command("--tokens", "50")) == 0
    assert not [message for message in logged if "past_key_values" in message]


def test_plans_have_the_sizes_of_the_cache() -> None:
    assert (Plan().window_length, Plan().num_sink_tokens) == (256, 4)


def row(*values: float, way: str = "sinks") -> figures.Row:
    one = figures.Row(way, way, 10)
    one.add(values, 10, 0.0)
    return one


def test_ratio_is_paired_over_the_positions_that_both_have() -> None:
    ratio, error = row(1.5, 3.5).ratio_to(row(1.0, 3.0, 9.0))
    assert ratio == pytest.approx(math.exp(0.5))
    assert error == pytest.approx(0.0, abs=1e-6)


def test_a_curve_has_its_points_in_the_middle_of_its_stretches() -> None:
    one = row(*[1.0] * 10, *[2.0] * 14)
    record = {
        "every": 5,
        "stretch_scores": 10,
        "window_length": 100,
        "context_length": 150,
        "tokens": 240,
        "text": {"name": "a.txt"},
        "rows": [one.as_dict(one, 10)],
    }
    (panel,) = figures.panels(record)
    (curve,) = panel.curves
    assert list(curve.x) == [125.0, 185.0]  # the last four scores go with the second stretch
    assert list(curve.y) == pytest.approx([math.exp(1), math.exp(2)], abs=1e-3)
    assert panel.marks == ((150, "trained context"),)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("never_loaded")
@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--tokens", "99999"], "tokens at most, but tokens=99999"),
        (["--tokens", "5"], "does not reach past a window"),
        (["--dense-tokens", "5"], "dense_tokens=5 does not reach past a window"),
        (["--every", "0"], "every=0"),
        (["--num-sink-tokens", "12"], "leaves no room"),
        (["--ways", "sinks,magic"], "give one or several of dense,recomputed"),
        (["--json", "no/such/directory/x.json"], "no directory"),
        (["--json", "."], "is a directory"),
        (["--plot", "no/such/directory/x.png"], "no directory"),
        (["--plot", "x.jpeg2"], "no picture that can be drawn"),
    ],
)
def test_refused_before_a_model_is_loaded(
    extra: list[str], message: str, command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in failure(command(*extra), capsys)


@pytest.mark.usefixtures("never_loaded")
def test_missing_text(command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot be read" in failure(command(text=tmp_path / "missing.txt"), capsys)


def test_a_text_that_is_too_short(command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert "The text has 200 tokens, but tokens=999." in failure(command("--tokens", "999"), capsys)


@pytest.fixture
def written(command: Callable[..., list[str]], tmp_path: Path) -> Iterator[Path]:
    """A finished file, which the test must leave as it is."""
    file = tmp_path / "figures.json"
    assert cli.main(command("--ways", "window", "--json", str(file))) == 0
    before = file.read_text(encoding="utf-8")
    yield file
    assert file.read_text(encoding="utf-8") == before


def test_a_file_of_another_plan_text_or_model_name_is_refused_by_name_before_a_model_is_loaded(
    written: Path,
    command: Callable[..., list[str]],
    never_loaded: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = ["--json", str(written)]
    said = failure(command(*file, "--every", "4"), capsys)
    assert f"{written} holds figures with another every: 3, and this is 4." in said
    assert "another dtype: float32, and this is bfloat16" in failure(command(*file, "--dtype", "bfloat16"), capsys)
    assert "another model: tiny, and this is other" in failure(command(*file, model="some/other"), capsys)
    other = tmp_path / "other.txt"
    other.write_text(TEXT.replace("word1 ", "word2 "), encoding="utf-8")
    assert "another text: book.txt" in failure(command(*file, text=other), capsys)


def test_a_file_of_other_weights_is_refused(
    written: Path, command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = write_model(tmp_path / "tiny", seed=1)
    assert "another weights: " in failure(command("--json", str(written), model=trained), capsys)


@pytest.mark.usefixtures("never_loaded")
@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "cannot be read"), ("[]", "does not say what was measured"), ('{"measure": "cost"}', "record of 'cost'")],
)
def test_a_file_of_something_else_is_not_written_over(
    content: str,
    message: str,
    command: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "mine.json"
    file.write_text(content, encoding="utf-8")
    assert message in failure(command("--json", str(file)), capsys)
    assert file.read_text(encoding="utf-8") == content


# --- real weights -----------------------------------------------------------------------------------------------------


@pytest.mark.real_model
@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m-fp32", "gemma3-270m-fp32"])
def test_real_model_stays_fluent_past_many_windows(name: str) -> None:
    """Takes some minutes on a CPU."""
    root, text = os.environ.get("SINK_PATCH_REAL_MODELS", ""), Path(os.environ.get("SINK_PATCH_REAL_TEXT", ""))
    if not root or not (Path(root) / name).is_dir():
        pytest.skip(f"set SINK_PATCH_REAL_MODELS to the directory that holds {name} (plain fp32 weights and tokenizer)")
    if not text.is_file():
        pytest.skip("set SINK_PATCH_REAL_TEXT to a long English text, such as Pride and Prejudice")
    plan = Plan(window_length=256, num_sink_tokens=4, tokens=2048, every=8, ways=("recomputed", "sinks", "window"))
    model = str(Path(root) / name)
    recomputed, sinks, no_sinks = run.measure(models.load(model), run.prepare(text, plan, None, model, "float32"))
    assert sinks.ratio_to(recomputed)[0] < 1.03
    assert no_sinks.ratio_to(recomputed)[0] > 1.3
