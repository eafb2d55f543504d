"""Nothing is kept before a test, nor after it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import sink_patch


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    limit = sink_patch.kept_streams.limit
    sink_patch.kept_streams.clear()
    yield
    sink_patch.kept_streams.clear()
    sink_patch.kept_streams.limit_bytes(limit)
