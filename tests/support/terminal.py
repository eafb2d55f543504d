"""A program in a terminal: what it prints is read, and lines are typed."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

TIMEOUT = 300  # seconds
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


class Terminal:
    """A program whose input and output are a terminal of 24 lines and 80 columns.

    Args:
        command: of the program.
        folder: its working directory.
        environment: its variables.
    """

    def __init__(self, command: Sequence[str], folder: Path, environment: Mapping[str, str]):
        self._end, programs_end = pty.openpty()
        settings = {**environment, "TERM": "xterm", "LINES": "24", "COLUMNS": "80"}
        self._process = subprocess.Popen(
            command,
            stdin=programs_end,
            stdout=programs_end,
            stderr=programs_end,
            cwd=folder,
            env=settings,
            start_new_session=True,
        )
        os.close(programs_end)
        self.printed = ""  # so far, without control characters

    def type(self, line: str) -> None:
        """A line, with the key at its end."""
        os.write(self._end, f"{line}\n".encode())

    def wait_for(self, text: str, times: int = 1) -> None:
        """Read until a text has been printed so many times."""
        end = time.monotonic() + TIMEOUT
        while self.printed.count(text) < times:
            assert time.monotonic() < end, f"{text!r} was not printed {times} times:\n{self.printed}"
            assert self._read() or self._process.poll() is None, f"it ended:\n{self.printed}"

    def end(self) -> int:
        """Wait for the program to end; its exit code."""
        end = time.monotonic() + TIMEOUT
        while self._process.poll() is None and time.monotonic() < end:
            self._read()
        self._process.kill()
        os.close(self._end)
        return self._process.wait(TIMEOUT)

    def _read(self) -> bool:
        ready, _, _ = select.select([self._end], [], [], 0.2)
        try:
            new = os.read(self._end, 65536) if ready else b""
        except OSError:  # the program has closed its end
            time.sleep(0.05)
            return False
        self.printed += _CONTROL.sub("", new.decode(errors="replace"))
        return bool(new)
