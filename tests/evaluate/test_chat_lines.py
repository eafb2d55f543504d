"""`sink-patch chat` does not lose the talk: over a second Ctrl-C, and over a line that is not UTF-8."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sink_patch.evaluate.chat import program
from tests.evaluate.test_chat import TEMPLATE, Replay, conversation, run, tokenizer, words
from tests.support import directory
from tests.support.fresh import environment
from tests.support.server import ROOT

NOT_UTF8 = "That line is not UTF-8 and was left out. Check the encoding of your terminal."
NOT_ANSWERED = "Stopped; that message was not answered."


@pytest.mark.parametrize("presses", [2, 5])
@pytest.mark.parametrize("at", [1, 6])  # the forward of the second answer: of the prompt, or of a token
def test_a_second_ctrl_c_ends_the_answer_and_not_the_chat(monkeypatch, presses, at):
    talk, replay, count = conversation(), Replay(), [0]

    def press(*_args: Any) -> None:
        count[0] += bool(talk.state.answers)
        if count[0] == at:
            monkeypatch.setattr(talk, "_forget", press_on)
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    def press_on(forget: Any = talk._forget) -> None:
        """Keys that come while the talk is put back."""
        for _ in range(presses - 2):
            signal.raise_signal(signal.SIGINT)
        forget()

    hook = talk.model.model.layers[1].register_forward_hook(press)
    monkeypatch.setattr(program, "Conversation", lambda *_args: talk)
    try:
        out = run(monkeypatch, [words(0), words(3), words(1)], talk, TEMPLATE)
    finally:
        hook.remove()
    first = replay.answer(words(0))
    assert out.count(NOT_ANSWERED) == 1
    assert [message["content"] for message in talk.state.messages[1::2]] == [words(0), words(1)]
    again = conversation()
    again.state.messages = talk.state.messages[:3]
    again.answer(words(1), lambda _piece: None, lambda: False)
    assert talk.state.messages == again.state.messages
    assert first in out


def test_a_command_that_is_stopped_says_so(monkeypatch):
    def stopped(*_args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(program.show, "write", stopped)
    out = run(monkeypatch, ["/window", "/reset"], conversation(), TEMPLATE)
    assert "\nStopped.\nForgotten" in out


@pytest.mark.parametrize(
    "line", ["w5 \udcff", UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")], ids=["escaped", "strict"]
)
def test_a_line_that_is_not_utf8_is_left_out(monkeypatch, line):
    out = run(monkeypatch, [line, words(0)], conversation(), TEMPLATE)
    assert NOT_UTF8 in out
    assert Replay().answer(words(0)) in out


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_the_lines_around_it_are_read(tmp_path: Path, errors: str) -> None:
    folder = directory.write(tmp_path / "model")
    tokenizer().save_pretrained(folder)
    command = [sys.executable, "-m", "sink_patch.cli", "chat", str(folder), "--greedy", "--max-new-tokens", "3"]
    done = subprocess.run(
        command,
        input=b"/help\nw5 \xff\n/reset\n",
        capture_output=True,
        env={**os.environ, **environment([ROOT]), "PYTHONIOENCODING": f"utf-8:{errors}"},
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    before, after = done.stdout.decode().split(NOT_UTF8)
    assert program.HELP in before
    assert "Forgotten." in after
