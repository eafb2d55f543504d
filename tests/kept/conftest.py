"""Nothing is kept before a test, nor after it; a server and its model directory for the tests that need one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import sink_patch
from tests.kept.clients import TEMPLATE, Server
from tests.kept.talk import S, W
from tests.support import directory
from tests.support.server import serving

SIZES = {"window_length": W, "num_sink_tokens": S, "keep_streams": 8}


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    limit = sink_patch.kept_streams.limit
    sink_patch.kept_streams.clear()
    yield
    sink_patch.kept_streams.clear()
    sink_patch.kept_streams.limit_bytes(limit)


@pytest.fixture(scope="package")
def folder(tmp_path_factory) -> Path:
    """A model directory that asks for all of it."""
    where = directory.write(tmp_path_factory.mktemp("model"), cache_implementation="sink", cache_config=SIZES)
    tokenizer = directory.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory) -> Iterator[Server]:
    """One for each file: in a first turn, what another test has left may be the beginning of the prompt."""
    logs = tmp_path_factory.mktemp("server")
    with serving(folder, logs, program=("tests.kept.server", str(logs / "read"))) as url:
        yield Server(url, logs / "read", str(folder))
