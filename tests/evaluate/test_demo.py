"""`sink-patch demo` with a tiny model: the story, the terminal, the comparison, the picture, Ctrl-C, bad arguments."""

from __future__ import annotations

import io
import logging
import math
import os
import re
import signal
import sys

import pytest
import torch

from sink_patch import cli
from sink_patch.evaluate import models
from sink_patch.evaluate.demo import compare, defaults, picture, progress, screens, story
from tests.support import directory
from tests.support.fresh import environment
from tests.support.measured import failure
from tests.support.server import ROOT
from tests.support.terminal import Terminal
from tests.support.tiny import tiny, tokens
from tests.support.tokenizer import tiny_tokenizer

W, S = 12, 3
TEXT = " ".join(f"w{(7 * number * number + number) % 90}" for number in range(200))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> str:
    return str(directory.write(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def short_text(monkeypatch) -> None:
    """A text in words of the tiny model, in place of that of the demo."""
    ids = directory.tokenizer()(TEXT, return_tensors="pt")["input_ids"][0]
    monkeypatch.setattr(compare, "text_ids", lambda _loaded, window_length: ids[: 6 * window_length + 1])


def window(length: int = W, sinks: int | None = S) -> list[str]:
    return ["--window-length", str(length), *(() if sinks is None else ("--num-sink-tokens", str(sinks)))]


# --- the story, as plain text ---------------------------------------------------------------------------------------


def test_it_streams_past_its_window(model_dir, capsys):
    assert cli.main(["demo", model_dir, *window(), "--max-new-tokens", "60", "--prompt", "w3 w4"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith(f"tiny, window of {W} tokens, {S} sinks\n")
    assert "65 tokens, prompt counted in: 5.4 windows." in out  # w1 w3 w4 w2 w3
    assert f"the first {S} tokens and the newest {W - S}. What lies between is forgotten, the prompt too" in out
    assert not {"\x1b", "\r"} & set(out)
    lines = [line for line in out.splitlines() if line.startswith("[")]
    assert [line.split(" |")[0] for line in lines] == [
        f"[{count} tokens = {count / W:.1f} windows" for count in (18, 30, 42, 54)
    ]
    # 2 layers, keys and values, 2 heads of 16, 4 bytes: the window and not a token more
    assert all(f"cache {2 * 2 * W * 2 * 16 * 4 / 1e6:.2f} MB" in line for line in lines)
    story_alone = re.sub(r"\s*\[.*?\]\s*", " ", out.split("\n\n", 1)[1].rpartition("\n\n")[0])
    assert len(re.findall(r"\bw\d+\b", story_alone)) == 60


def test_the_whole_prompt_stays_where_it_leaves_room(model_dir, capsys):
    asked = ["demo", model_dir, "--max-new-tokens", "30"]
    assert cli.main([*asked, *window(W, None), "--prompt", "w3 w4 w5"]) == 0
    out = capsys.readouterr().out
    assert f"window of {W} tokens, 6 sinks\n" in out
    assert "The first are the prompt, so it keeps to its subject." in out
    assert cli.main([*asked, *window(W, None), "--prompt", "w3 w4 w5 w6"]) == 0
    assert f"window of {W} tokens, 4 sinks\n" in capsys.readouterr().out


def test_a_token_that_ends_the_text_is_never_chosen(model_dir, capsys, monkeypatch):
    """Special tokens have no text, so the words would be fewer."""
    monkeypatch.setattr(story, "_SAMPLING", {"do_sample": True, "temperature": 100.0})  # nearly uniform
    special = directory.tokenizer()
    special.add_special_tokens({"additional_special_tokens": [f"w{number}" for number in range(10, 60)]})
    loaded = models.Loaded("tiny", directory.model(), special)
    story.tell(loaded, story.Settings(W, S, 60, "w3"), screens.Plain(sys.stdout))
    words = [int(word) for word in re.findall(r"\bw(\d+)\b", capsys.readouterr().out)]
    assert len(words) == 60
    assert not set(words) & {*range(10, 60)}


def test_the_prompt_goes_through_the_chat_template():
    assert story.prompt_ids(tiny_tokenizer(), "word3").tolist() == [[4, 6, 5]]
    assert story.prompt_ids(tiny_tokenizer(chat_template=None), "word3").tolist() == [[6]]


def test_what_stays_within_the_window_says_so(model_dir, capsys):
    assert cli.main(["demo", model_dir, *window(64), "--max-new-tokens", "5"]) == 0
    assert "Nothing has left the window yet" in capsys.readouterr().out


def test_repetition_is_made_less_likely_behind_the_sinks_alone():
    scores = torch.tensor([[2.0, -2.0, 3.0, 4.0]])
    made = progress.RecentRepetitionPenalty(num_sink_tokens=1, penalty=2.0)(torch.tensor([[3, 0, 1, 0]]), scores)
    assert made.tolist() == [[1.0, -4.0, 3.0, 4.0]]


@pytest.mark.filterwarnings("error:.*past_key_values. is deprecated")  # which is ignored in all other tests
@pytest.mark.usefixtures("short_text")
def test_no_deprecated_name_of_the_cache_is_used(model_dir, monkeypatch):
    logged: list[str] = []  # transformers logs some deprecations, once in a process
    monkeypatch.setattr(
        logging.Logger, "warning_once", lambda _self, message, *_args, **_kwargs: logged.append(message)
    )
    assert cli.main(["demo", model_dir, *window(), "--max-new-tokens", "30", "--compare"]) == 0
    assert not [message for message in logged if "past_key_values" in message]


# --- a terminal -----------------------------------------------------------------------------------------------------


def on_console(pieces: list[str], width: int = 20) -> list[str]:
    """What a terminal shows in the end of a running text with figures below."""
    console = pytest.importorskip("rich.console")
    out = io.StringIO()
    screen = screens.Terminal(console.Console(file=out, force_terminal=True, width=width, height=24, color_system=None))
    with screen:
        for piece in pieces:
            screen.text(piece)
            screen.figures("[figures]", is_window=False)
    shown = out.getvalue()
    assert shown.endswith("\x1b[?25h")  # the cursor is there again
    return as_seen(shown)


def as_seen(printed: str) -> list[str]:
    """The rows of a terminal that knows the codes that rich uses here: up, erase the line, carriage return."""
    rows, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", printed):
        if part == "\n":
            row, column = row + 1, 0
            rows += [""] * (row == len(rows))
        elif part == "\r":
            column = 0
        elif part.endswith("A") and part[0] == "\x1b":
            row -= int(part[2:-1])
        elif part == "\x1b[2K":
            rows[row] = ""
        elif part[0] != "\x1b":
            rows[row] = rows[row][:column].ljust(column) + part + rows[row][column + len(part) :]
            column += len(part)
    return [one.rstrip() for one in rows]


def test_text_is_broken_between_words():
    words = "The ship sails over a wide sea, and nobody knows the way home."
    shown = on_console([*re.findall(r" ?\S+", words), "\n\n", "Averyveryveryverylongword", " 海海海海海海海海海海海"])
    assert shown == [
        "The ship sails over",
        "a wide sea, and",
        "nobody knows the way",
        "home.",
        "",
        "Averyveryveryverylon",
        "gword",
        "海海海海海海海海海海",  # two columns each
        "海",
        "",
        "[figures]",
        "",
    ]


def test_control_codes_of_the_model_do_not_reach_the_terminal():
    assert on_console(["red \x1b[31m", "\x07bell\r"])[0] == "red [31mbell"


def test_a_terminal_shows_the_table_as_it_grows():
    console = pytest.importorskip("rich.console")
    out = io.StringIO()
    with screens.Terminal(console.Console(file=out, force_terminal=True, width=40, height=24)) as screen:
        screen.table([("tokens", "a way"), ("12", "1.0 in 2.0 MB")], is_window=True)
        screen.table([("tokens", "a way"), ("12", "1.0 in 2.0 MB"), ("24", "3.0 in 4.0 MB")], is_window=False)
    assert "3.0 in 4.0 MB" in out.getvalue()


class Interruptible(Terminal):
    def interrupt(self) -> None:
        os.kill(self._process.pid, signal.SIGINT)


def test_ctrl_c_in_a_terminal_ends_with_the_summary(model_dir, tmp_path):
    pytest.importorskip("rich")
    asked = [*window(), "--max-new-tokens", "1000000", "--prompt", "w3 w4"]
    command_line = [sys.executable, "-m", "sink_patch.cli", "demo", model_dir, *asked]
    program = Interruptible(command_line, tmp_path, environment([ROOT]))
    program.wait_for("tokens = 4.")  # the line of figures
    program.interrupt()
    assert program.end() == 130
    shown = program.printed
    assert "sink-patch: stopped." in shown
    assert "windows." in shown
    assert "What lies between is forgotten" in " ".join(shown.split())
    assert "Traceback" not in shown
    text = [line.strip() for line in shown.split("\n") if re.fullmatch(r"(w\d+ )*w\d+", line.strip())]
    assert text
    assert max(len(line) for line in text) in range(70, 81)


def test_no_terminal_and_no_rich_are_plain(monkeypatch):
    class Console(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert isinstance(screens.screen_on(io.StringIO()), screens.Plain)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(screens.screen_on(Console()), screens.Plain)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(screens.screen_on(Console()), screens.Plain)


# --- the comparison, and its picture --------------------------------------------------------------------------------


def by_hand(model, ids: torch.Tensor, target: int, seen: list[int]) -> float:
    logits = model(ids[None, seen], use_cache=False).logits[0, -1].log_softmax(-1)
    return float(-logits[ids[target]])


@torch.no_grad()
def test_the_three_ways_equal_plain_forwards_over_what_they_see():
    """With one layer a key depends on its own token alone."""
    model, ids, length, piece = tiny("llama"), tokens(97)[0], 24, 16
    *_, last = compare.read(model, ids, length, S)
    scored = range(96 - length, 96)
    begin = {place: place // piece * piece for place in scored}
    seen = {
        0: {place: list(range(place + 1)) for place in scored},
        1: {place: list(range(begin[place] + piece - length, place + 1)) for place in scored},
        2: {place: [*range(S), *range(begin[place] + piece - length + S, place + 1)] for place in scored},
    }
    for way, places in seen.items():
        mean = sum(by_hand(model, ids, place + 1, places[place]) for place in scored) / length
        assert last.perplexity[way] == pytest.approx(math.exp(mean), rel=1e-3)
    key = 2 * 16 * 4 / 1e6  # 2 heads of 16, 4 bytes; the sinks' keys are kept twice
    sizes = (96 * 2 * key, length * 2 * key, length * 2 * key + S * key)
    assert (last.tokens, last.megabytes) == (96, pytest.approx(sizes))


@pytest.mark.usefixtures("short_text")
def test_the_comparison_as_plain_text_and_its_picture(model_dir, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file = tmp_path / "picture.svg"
    assert cli.main(["demo", model_dir, *window(), "--max-new-tokens", "3", "--plot", str(file)]) == 0
    out = capsys.readouterr().out
    assert "window, 3 sinks" in out
    rows = [line.split() for line in out.splitlines() if re.fullmatch(r" *\d+( +[\d.]+ in [\d.]+ MB){3}", line)]
    assert [int(row[0]) // W for row in rows] == [1, 2, 3, 4, 5, 6]
    assert f"Drawn: {file}" in out
    drawn = file.read_text()
    assert drawn.startswith("<?xml")


def test_the_text_is_read_by_some_windows_of_it():
    loaded = models.Loaded("tiny", directory.model(), directory.tokenizer())
    assert len(compare.text_ids(loaded, 24)) == 6 * 24 + 1
    with pytest.raises(ValueError, match="less than two windows of 100000"):
        compare.text_ids(loaded, 100_000)


# --- bad arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--max-new-tokens", "0"], "max_new_tokens=0"),
        (["--window-length", "3"], "leaves no room"),
        (["--num-sink-tokens", "-1"], "num_sink_tokens=-1"),
        (["--plot", "no/such/directory/a.png"], "no directory no/such/directory"),
        (["--plot", "a.txt"], ".png"),
    ],
)
def test_bad_arguments_are_refused_before_a_model_is_loaded(extra, message, capsys, monkeypatch):
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("it was loaded"))
    assert message in failure(["demo", *extra], capsys)


def test_a_picture_without_matplotlib(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("it was loaded"))
    monkeypatch.setattr(picture, "find_spec", lambda _name: None)
    assert 'pip install "sink-patch[demo]"' in failure(["demo", "--plot", str(tmp_path / "a.png")], capsys)


def test_a_wrong_path_of_a_model(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "cannot be loaded" in failure(["demo", str(tmp_path)], capsys)


def test_defaults(capsys):
    assert (story.Settings().window_length, story.Settings().max_new_tokens) == (defaults.WINDOW, defaults.TOKENS)
    with pytest.raises(SystemExit):
        cli.main(["demo", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert f"(default: {defaults.WINDOW})" in out
    assert "(default: the whole prompt" in out
