"""Fresh patch state and a fresh registry for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import sink_patch
from sink_patch import registry as registry_module


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    sink_patch.patch()
    monkeypatch.setattr(registry_module, "registry", registry_module.Registry())
    yield
    sink_patch.patch()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)
