"""One run of the tests for each version; some run at the same time."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

from packaging.version import Version

from tests.matrix.environments import HERE, environment, packages_of, python_of
from tests.matrix.records import NO_ENVIRONMENT, TOO_LONG, Record, read
from tests.matrix.versions import VERSIONS

CHECKOUT = Path(__file__).parent.parent.parent
ALIKE = (
    *("--deselect", "tests/streaming/test_oracle.py::test_no_schedule_is_a_counterexample"),
    *("--deselect", "tests/streaming/test_precision.py"),
    *("--deselect", "tests/streaming/test_many_layers.py"),
    *("--deselect", "tests/kept/test_faults.py"),
    *("--deselect", "tests/cache/test_bad_files.py"),
    *("--deselect", "tests/evaluate/test_chat.py::test_a_talk_over_many_windows_in_a_terminal"),
    *("--deselect", "tests/evaluate/test_demo.py::test_ctrl_c_in_a_terminal_ends_with_the_summary"),
    *("--ignore", "tests/bench"),
    *("--ignore", "tests/rules"),
    *("--ignore", "tests/evaluate/test_eval_perplexity.py"),
    *("--ignore", "tests/evaluate/test_eval_recall.py"),
)
"""Long tests whose result does not depend on the version: the README's command runs them on the newest."""
SLOW = "test_each_family_equals_the_oracle and long_window"
EAGER = "test_each_family_equals_the_oracle and eager and not llama and not gpt and not codegen and not gemma"
QUICK = (
    *(
        "tests/streaming/test_oracle.py",
        "tests/generation/test_generate.py",
        "tests/generation/test_same_text.py",
        "tests/compat/test_private_places.py",
    ),
    # in a process that imports nothing of ours
    "tests/serving/test_pipeline.py::test_a_pipeline_that_knows_only_the_directory_streams[entries]",
    *("-k", f"not ({EAGER}) and not ({SLOW})"),
    *ALIKE,
)
COMPILED = (
    "test_one_graph_serves_all_tokens_of_three_streams[llama-sdpa]",
    "test_one_graph_serves_all_tokens_of_three_streams[gemma3_text-eager]",
    "test_rows_of_different_lengths_and_a_second_turn",
    "test_beams_are_compiled_too",
    "test_a_compiled_forward_has_a_graph_for_prompts_and_one_for_tokens",
    "test_a_compiled_model_in_a_loop_without_generate_is_right",
    "test_a_row_may_have_no_new_token",
    "test_inductor_gives_the_same_text",
)
ON_TORCH = (
    *(f"tests/generation/test_compiled.py::{name}" for name in COMPILED),
    "tests/buffers",
    "tests/cache/test_files.py",
    "tests/test_package.py",
)
"""What rests on torch or Python more than on transformers."""
SUITES: dict[str, tuple[str, ...]] = {
    "all": ("--deselect", "tests/generation/test_compiled.py::test_inductor_gives_the_same_text", *ALIKE),
    "quick": QUICK,
    "quick + families": ("tests/models/test_coverage.py", *QUICK),
    "torch": (*ON_TORCH, *QUICK),
}
"""The arguments of pytest for each suite. The quick one has eager attention for a few families: those that have no
other, or masks of their own; and of the oracle's windows the short ones alone."""
TIMEOUT = 60 * 60
"""Seconds for one version. A run that takes longer hangs."""
OLD = "SINK_PATCH_OLD_TRANSFORMERS"
"""Where tests/cache/test_old_sink_cache.py finds transformers 4.52, whose SinkCache it compares with ours."""


@dataclass(frozen=True)
class Run:
    """The tests to run on one version.

    Args:
        version: of transformers.
        suite: of SUITES, or "some" if the paths were given by hand.
        paths: arguments of pytest.
        root: the folder of environments, logs and scratch files.
    """

    version: str
    suite: str
    paths: tuple[str, ...]
    root: Path

    @property
    def log(self) -> Path:
        """The output of pip and pytest."""
        return self.root / f"{self.version}.log"

    @property
    def scratch(self) -> Path:
        """A folder for the files of this run alone, because versions run at the same time."""
        return self.root / "scratch" / self.version

    @property
    def cost(self) -> tuple[bool, Version]:
        """A key by which longer runs are larger: whole suites, and then newer versions, which have more models."""
        return self.suite == "all", Version(self.version)


def all_of(runs: Sequence[Run], jobs: int) -> Iterator[Record]:
    """The records, in the order in which the runs end.

    All environments are created first, because a test may use another one. Then the longest run starts first, so that
    no processor is idle at the end.
    """
    with ThreadPoolExecutor(jobs) as pool:
        made = dict(zip(runs, pool.map(prepare, runs), strict=True))
        yield from (beside(Record(run.version, run.suite, NO_ENVIRONMENT)) for run in runs if not made[run])
        ordered = sorted((run for run in runs if made[run]), key=lambda run: run.cost, reverse=True)
        for done in as_completed([pool.submit(record, run) for run in ordered]):
            yield done.result()


def prepare(run: Run) -> bool:
    """Create the environment of a version; False if that failed (the log says why)."""
    run.scratch.mkdir(parents=True, exist_ok=True)
    with run.log.open("w") as log:
        try:
            environment(run.version, run.root, log)
        except subprocess.CalledProcessError as failure:
            log.write(f"{failure}\n")
            return False
    return True


def record(run: Run) -> Record:
    """Run the tests in the environment of a version."""
    junit = run.scratch / "junit.xml"
    junit.unlink(missing_ok=True)
    start = time.monotonic()
    # not in the checkout, because some tests start pytest in their folder or copy the checkout
    with tempfile.TemporaryDirectory(prefix=f"matrix-{run.version}-") as temporary:
        try:
            exit_code = run_pytest(run, junit, Path(temporary, "tests"))
        except subprocess.TimeoutExpired:
            exit_code = TOO_LONG
    return beside(read(run.version, run.suite, exit_code, time.monotonic() - start, junit, run.log))


def beside(found: Record) -> Record:
    """A record that says the torch and the Python of this process, which are those of its environments."""
    torch, python = HERE
    return replace(found, torch=torch, python=python)


def run_pytest(run: Run, junit: Path, temporary: Path) -> int:
    """Pytest's exit code; its output goes to the log."""
    command = [str(python_of(run.root / run.version)), "-m", "pytest", "-p", "no:cacheprovider"]
    own = ["--basetemp", str(temporary), "--junitxml", str(junit), "-o", "junit_family=xunit1"]
    with run.log.open("a") as log:
        return subprocess.run(
            [*command, *own, *run.paths],
            cwd=CHECKOUT,
            env={**os.environ, **variables(run)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT,
            check=False,
        ).returncode


def variables(run: Run) -> dict[str, str]:
    """Environment variables: one thread, no network, and no files that two runs share."""
    found = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(run.scratch / "huggingface"),
        "HYPOTHESIS_STORAGE_DIRECTORY": str(run.scratch / "hypothesis"),
    }
    oldest = packages_of(run.root / VERSIONS[0])
    if OLD not in os.environ and oldest.is_dir():
        found[OLD] = str(oldest)
    return found
