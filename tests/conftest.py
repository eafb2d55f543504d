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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many architectures have a proven verdict, where that was tested."""
    reports = terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("skipped", [])
    if any("test_coverage" in report.nodeid for report in reports if hasattr(report, "nodeid")):
        verdicts = sink_patch.coverage().verdicts
        exact = sum(verdict.exact is True for verdict in verdicts)
        terminalreporter.write_line(f"{len(verdicts)} architectures: {exact} exact, {len(verdicts) - exact} refused")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)
