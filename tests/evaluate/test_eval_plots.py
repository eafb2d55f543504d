"""Records as files, and the pictures of them."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sink_patch import cli
from sink_patch.evaluate.measures import picture, plots, records
from sink_patch.evaluate.measures.plots import Curve, Panel
from tests.support.measured import failure

PERPLEXITY: dict[str, Any] = {
    "measure": "perplexity",
    "model": "tiny",
    "dtype": "float32",
    "window_length": 16,
    "num_sink_tokens": 4,
    "text": {"name": "book.txt"},
    "tokens": 200,
    "every": 1,
    "context_length": 64,
    "stretch_scores": 90,
    "rows": [
        {"way": "sinks", "scores": [1.0] * 180, "perplexity_by_stretch": [20.0, 21.0]},
        {"way": "window", "scores": [1.0] * 180, "perplexity_by_stretch": [400.0, 500.0]},
        {"way": "dense", "scores": []},
    ],
}
COST: dict[str, Any] = {
    "measure": "cost",
    "model": "tiny",
    "dtype": "float32",
    "window_length": 16,
    "num_sink_tokens": 4,
    "tokens": [16, 32],
    "rows": [
        {"name": "dense", "ms_a_token": [1.0, 2.0], "cache_bytes": [10**6, 2 * 10**6], "process_bytes": [10**8, 10**8]},
        {"name": "sinks", "ms_a_token": [1.0, 1.0], "cache_bytes": [10**6, 10**6], "process_bytes": [10**8, 10**8]},
    ],
}


def file_of(record: Any, path: Path) -> str:
    path.write_text(json.dumps(record), encoding="utf-8")
    return str(path)


# --- records ----------------------------------------------------------------------------------------------------------


def test_a_record_is_read_as_it_was_written_and_lists_of_numbers_are_one_line(tmp_path: Path) -> None:
    file, record = (
        tmp_path / "a.json",
        {"measure": "x", "n": [1, 2.5, None], "words": ["[1,  2]", "b"], "deep": [[1], []]},
    )
    records.write(file, record)
    assert records.read(file) == record
    assert ' "n": [1, 2.5, null],\n' in file.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [file]


def test_a_record_that_cannot_be_written_whole_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.json"
    records.write(file, {"measure": "old"})

    def half(self: Path, text: str, encoding: str) -> None:
        self.write_bytes(text[:5].encode(encoding))
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="disk full"):
        records.write(file, {"measure": "new"})
    assert records.read(file) == {"measure": "old"}


# --- panels -----------------------------------------------------------------------------------------------------------


def test_panels_of_one_title_become_one_and_curves_are_named_by_what_differs() -> None:
    one = Panel("Latency", "tokens", "ms", (Curve("sinks", [1, 2], [3, 4]),), marks=((5, "context"),))
    other = Panel("Memory", "tokens", "MB", (Curve("sinks", [1, 2], [3, 4]),))
    first = {"model": "a", "window_length": 16, "num_sink_tokens": 4}
    merged = plots.together([first, {**first, "num_sink_tokens": 0}], [[one, other], [one]])
    assert [panel.title for panel in merged] == ["Latency", "Memory"]
    assert [(curve.of, curve.style) for curve in merged[0].curves] == [("4 sinks", 0), ("0 sinks", 1)]
    assert merged[0].marks == ((5, "context"),)
    assert [curve.of for curve in plots.together([first], [[one]])[0].curves] == [""]


def test_panels_of_the_two_measures() -> None:
    (perplexity,) = picture._panels()["perplexity"](PERPLEXITY)
    assert [curve.label for curve in perplexity.curves] == ["sinks", "window, no sinks"]  # nothing of dense was read
    assert perplexity.log_y
    assert list(perplexity.curves[0].x) == [61.0, 151.0]
    memory, latency = picture._panels()["cost"](COST)
    assert [curve.label for curve in memory.curves][:2] == ["dense", "sinks"]
    assert list(memory.curves[0].y) == [1.0, 2.0]
    assert latency.from_zero


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_several_measures_models_and_settings_in_one_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    drawn: list[Any] = []
    plain = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), plain(self, *a, **k))[1])
    files = [
        file_of(PERPLEXITY, tmp_path / "a.json"),
        file_of({**PERPLEXITY, "model": "other"}, tmp_path / "b.json"),
        file_of(COST, tmp_path / "c.json"),
    ]
    out = tmp_path / "all.png"
    assert cli.main(["eval", "plot", *files, "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    perplexity, memory, latency = drawn[0].axes
    assert [text.get_text() for text in perplexity.get_legend().get_texts()] == [
        f"{way}, {model}" for model in ("tiny", "other") for way in ("sinks", "window, no sinks")
    ]
    colours = [line.get_color() for line in perplexity.get_lines()[:4]]
    assert colours[:2] == colours[2:]
    assert perplexity.get_yscale() == memory.get_xscale() == "log"
    assert [tick.get_text() for tick in latency.get_xticklabels()] == ["16", "32"]
    assert latency.get_ylim()[0] == 0
    assert "trained context" in [text.get_text() for text in perplexity.texts]
    assert drawn[0]._suptitle.get_text() == "window of 16 tokens, 4 sinks"


def test_a_curve_without_finite_points_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    empty = Panel("P", "x", "y", (Curve("a", [1, 2], [math.nan, math.nan]),), log_y=True)
    plots.draw([empty, Panel("Q", "x", "y", (), log_y=True, log_x=True)], tmp_path / "a.svg")
    assert "<svg" in (tmp_path / "a.svg").read_text(encoding="utf-8")


def test_without_matplotlib_it_is_said_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = importlib.util.find_spec
    monkeypatch.setattr(plots, "find_spec", lambda name: None if name == "matplotlib" else plain(name))
    file = file_of(COST, tmp_path / "c.json")
    said = failure(["eval", "plot", file, "--out", str(tmp_path / "a.png")], capsys)
    assert 'pip install "sink-patch[plot]"' in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"measure": "magic"}, "no picture of 'magic'. Give records of one of perplexity, cost"),
        ([1], "does not say what was measured"),
        ({"rows": []}, "does not say what was measured"),
    ],
)
def test_records_that_cannot_be_drawn(
    content: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = file_of(content, tmp_path / "a.json"), tmp_path / "a.png"
    assert message in failure(["eval", "plot", file, "--out", str(out)], capsys)
    assert not out.exists()


def test_missing_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "a.png")]
    assert "cannot be read" in failure(["eval", "plot", str(tmp_path / "missing.json"), *out], capsys)


def test_what_the_help_needs_and_what_a_plot_needs_loads_no_torch() -> None:
    code = (
        "import sys\nfrom sink_patch import cli\nfrom sink_patch.evaluate.measures import picture\ncli._parser()\n"
        "picture._panels()\nprint(sorted({'torch', 'transformers', 'matplotlib', 'tqdm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_help_of_each_measure(capsys: pytest.CaptureFixture[str]) -> None:
    for measure in ([], ["perplexity"], ["cost"], ["plot"]):
        with pytest.raises(SystemExit) as left:
            cli.main(["eval", *measure, "--help"])
        assert left.value.code == 0
        assert "usage: sink-patch eval" in capsys.readouterr().out
