"""A fresh patch state, registry and models for each test; known gaps of the installed transformers are skipped."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

import sink_patch
from sink_patch.models.families import registry as registry_module
from tests.support.known_gaps import SkippedFile, reason_to_skip
from tests.support.tiny import unchanged

# for machines that do other work beside
hypothesis.settings.register_profile("patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("patient")

COLLECTED = pytest.StashKey[list[str]]()


@pytest.fixture(scope="module", autouse=True)
def models_of_a_file_unchanged() -> Iterator[None]:
    with unchanged():
        yield


@pytest.fixture
def unchanged_models() -> Iterator[None]:
    with unchanged():
        yield


@pytest.fixture(autouse=True)
def fresh_state(unchanged_models: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    sink_patch.patch()
    monkeypatch.setattr(registry_module, "registry", registry_module.Registry())
    yield
    sink_patch.patch()


def pytest_configure() -> None:
    """Listen to Ctrl-C, as the programs that tests start do: a job in the background of a script is begun deaf."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Skip whole files that the installed transformers cannot import (tests/support/known_gaps.py)."""
    if reason_to_skip(module_path.relative_to(parent.config.rootpath).as_posix()):
        return SkippedFile.from_parent(parent, path=module_path)
    return None


@pytest.hookimpl(tryfirst=True)  # before -k and -m deselect items
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the tests that the installed transformers cannot run (tests/support/known_gaps.py)."""
    config.stash[COLLECTED] = [item.nodeid for item in items]
    for item in items:
        if reason := reason_to_skip(item.nodeid):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def collected(pytestconfig: pytest.Config) -> list[str]:
    """The node ids of all tests. Skips the test unless every file was collected."""
    nodeids = pytestconfig.stash[COLLECTED]
    files = {path.relative_to(pytestconfig.rootpath).as_posix() for path in Path(__file__).parent.rglob("test_*.py")}
    if not {file for file in files if not reason_to_skip(file)} <= {nodeid.partition("::")[0] for nodeid in nodeids}:
        pytest.skip("the whole suite was not collected")
    return nodeids


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many architectures are exact and how many are refused, if that was tested; `tests.matrix` reads it."""
    reports = terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("skipped", [])
    if any("test_coverage" in report.nodeid for report in reports if hasattr(report, "nodeid")):
        verdicts = sink_patch.coverage().verdicts
        exact = sum(verdict.exact is True for verdict in verdicts)
        terminalreporter.write_line(f"{len(verdicts)} architectures: {exact} exact, {len(verdicts) - exact} refused")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)
