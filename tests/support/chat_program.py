"""`transformers chat` in a terminal: it is told something, and its answers are read from the file that it saves."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.support.fresh import environment
from tests.support.terminal import Terminal


def talk_in_a_terminal(
    folder: Path, url: str, said: Sequence[str], scratch: Path, *options: str
) -> list[dict[str, str]]:
    """All messages of a talk with a server.

    Args:
        folder: the model directory, which the program must not write to elsewhere.
        url: of the server.
        said: by the user, turn by turn.
        scratch: the working directory of the program.
        options: more of its arguments.
    """
    program = [sys.executable, "-m", "transformers.cli.transformers", "chat", str(folder), url, "do_sample=False"]
    # offline, the program refuses to call even this server
    terminal = Terminal([*program, *options, "--user", "me"], scratch, environment(HF_HUB_OFFLINE="0"))
    for turn, words in enumerate(said, start=1):
        terminal.wait_for("<me>:", turn)
        terminal.type(words)
        terminal.wait_for("Continue generating?", turn)  # the model has no token to end with
        terminal.type("n")
    terminal.wait_for("<me>:", len(said) + 1)
    terminal.type("!save")
    terminal.wait_for("Chat saved to")
    terminal.wait_for("<me>:", len(said) + 2)
    terminal.type("!exit")
    assert terminal.end() == 0
    saved: list[dict[str, str]] = json.loads(next(folder.rglob("chat_*.json")).read_text())["chat_history"]
    return saved
