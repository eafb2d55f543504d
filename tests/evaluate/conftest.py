"""What the commands change in transformers is put back after each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from transformers.utils import logging as transformers_logging


@pytest.fixture(autouse=True)
def restore_logging() -> Iterator[None]:
    """The commands silence transformers; other tests need its messages."""
    level = transformers_logging.get_verbosity()
    yield
    transformers_logging.set_verbosity(level)
    transformers_logging.enable_progress_bar()
