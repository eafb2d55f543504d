"""`transformers serve` over a model directory, in a process of its own, on loopback."""

from __future__ import annotations

import contextlib
import importlib.util
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.support.fresh import environment
from tests.support.known_gaps import is_newest

TIMEOUT = 300  # seconds
ROOT = Path(__file__).parent.parent.parent
_PACKAGES = ("fastapi", "uvicorn", "openai")
PROGRAM = ("transformers.cli.transformers",)


def _why_not() -> str:
    """Why no server can be started, empty: it can."""
    if not is_newest():
        return "the programs have other names and arguments in older versions of transformers"
    if not all(map(importlib.util.find_spec, _PACKAGES)):
        return "needs the server: pip install 'transformers[serving]'"
    return ""


needs_server = pytest.mark.skipif(bool(_why_not()), reason=_why_not())


@contextlib.contextmanager
def serving(folder: Path, logs: Path, program: Sequence[str] = PROGRAM, options: Sequence[str] = ()) -> Iterator[str]:
    """Inside, a server runs; yields its address.

    Args:
        folder: the model directory.
        logs: a folder for what it says, which pytest shows if a test fails.
        program: the module that is run, and its own arguments before those of `transformers`.
        options: of `transformers serve`, more than the directory and the address.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        *program,
        "serve",
        str(folder),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        *options,
    ]
    with (logs / "log").open("w") as output:
        server = subprocess.Popen(
            [*command, "--device", "cpu"], env=environment([ROOT]), cwd=logs, stdout=output, stderr=output
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_for(f"{url}/health", server)
        yield url
    finally:
        server.terminate()
        server.wait(TIMEOUT)
        print((logs / "log").read_text())


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + TIMEOUT
    while not _is_up(url):
        assert server.poll() is None, f"the server ended with {server.poll()}"
        assert time.monotonic() < end, "the server did not start"
        time.sleep(0.2)


def _is_up(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except OSError:
        return False
    return True
