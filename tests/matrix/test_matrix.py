"""The runner of the matrix: its input, its output, and how it calls pytest. No environment is created."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from dataclasses import asdict, replace

import pytest
from packaging.version import Version

from tests.matrix import __main__ as command_line
from tests.matrix import environments, report, runs
from tests.matrix.records import NO_ENVIRONMENT, TOO_LONG, Record, read
from tests.matrix.runs import Run
from tests.matrix.versions import VERSIONS

GOOD = Record("5.23.0", "all", 0, 61.4, 1200, 0, 0, 3, 128, 61, {}, {"no sdpa": 2, "no server": 1})
QUICK = Record("4.52.4", "quick", 0, 9.0, 40, skipped=1, reasons={"no sdpa": 1})
OTHER = replace(QUICK, version="5.24.0", suite="torch", torch="2.6.0", python="3.10")
BAD = replace(QUICK, exit_code=1, failed=1, errors=1, bad={"tests/test_a.py::test_b[1]": "assert 1 == 2"})
TESTS = {
    "test_all_kinds": """
        import pytest

        def test_passes():
            print("3 architectures: 3 exact, 0 refused")

        def test_fails_and_cannot_clean_up(broken):
            assert 1 == 2, "one is\\nnot two"

        @pytest.fixture
        def broken():
            yield
            raise ValueError("stuck")

        @pytest.mark.skip(reason="because")
        def test_skipped():
            pass

        @pytest.mark.parametrize("x", ["a", "b"])
        def test_skips_itself(x):
            pytest.skip("because")
    """,
    "test_no_import": "import a_module_that_is_not_there",
    "test_whole_file_skipped": 'import pytest\npytest.skip("it\'s not there", allow_module_level=True)',
    "conftest": """
        def pytest_terminal_summary(terminalreporter):
            terminalreporter.write_line("189 architectures: 128 exact, 61 refused")
    """,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The record of a real run of pytest with all kinds of results."""
    folder = tmp_path_factory.mktemp("suite")
    for name, text in TESTS.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(text))
    (folder / "pytest.ini").write_text("[pytest]\n")
    options = ["--junitxml=junit.xml", "-o", "junit_family=xunit1", "--continue-on-collection-errors"]
    with (folder / "log").open("w") as log:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]
        code = subprocess.run(command, cwd=folder, stdout=log, check=False).returncode
    return read("5.23.0", "all", code, 2.0, folder / "junit.xml", folder / "log")


def test_a_run_is_counted(made):
    assert (made.passed, made.failed, made.errors, made.skipped) == (1, 1, 2, 4)
    assert (made.exit_code, made.seconds, made.is_good) == (1, 2.0, False)


def test_failures_have_names_and_messages_of_one_line(made):
    assert list(made.bad) == ["test_no_import.py", "test_all_kinds.py::test_fails_and_cannot_clean_up"]
    missing, unequal = made.bad.values()
    assert "No module named 'a_module_that_is_not_there'" in missing
    assert unequal == "AssertionError: one is"


def test_each_reason_for_a_skip_is_counted_also_that_of_a_whole_file(made):
    assert made.reasons == {"because": 3, "it's not there": 1}


def test_the_architectures_are_those_of_the_last_line_with_them(made):
    assert (made.exact, made.refused) == (128, 61)


def test_a_pytest_that_died_ran_no_test(tmp_path):
    found = read("5.23.0", "all", -11, 2.0, tmp_path / "junit.xml", tmp_path / "log")
    assert found == Record("5.23.0", "all", -11, 2.0)
    assert not found.is_good


@pytest.mark.parametrize(
    ("record", "good"),
    [
        (GOOD, True),
        (BAD, False),
        (replace(GOOD, passed=0), False),
        (replace(GOOD, exit_code=2), False),
        (replace(GOOD, exit_code=0, errors=1), False),
    ],
)
def test_a_version_is_good_if_tests_ran_and_none_failed(record, good):
    assert record.is_good is good


def test_the_table_has_a_row_for_each_version():
    assert report.table([BAD, GOOD]).splitlines()[2:] == [
        "| 4.52.4 | quick | 40 | 2 | 1 | - | - |",
        "| 5.23.0 | all | 1,200 | 0 | 3 | 128 | 61 |",
    ]


def test_other_versions_of_torch_and_python_have_a_table_of_their_own():
    newer = replace(OTHER, torch="2.14.1")
    usual = replace(GOOD, torch="2.13.0", python="3.11")
    assert report.tables([newer, OTHER, usual]) == {
        "matrix": report.table([GOOD]),
        "torch": "| torch | Python | transformers | tests | passed | failed | skipped |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n"
        "| 2.6.0 | 3.10 | 5.24.0 | torch | 40 | 0 | 1 |\n"
        "| 2.14.1 | 3.10 | 5.24.0 | torch | 40 | 0 | 1 |",
    }
    assert [*report.tables([GOOD])] == ["matrix"]
    assert usual.key == GOOD.key != replace(usual, python="3.12").key
    assert [*report.tables([replace(usual, python="3.12")])] == ["torch"]


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        (OTHER, "transformers 5.24.0 with torch 2.6.0 on Python 3.10 (torch): 40 passed, 0 failed, 1 skipped in 9 s"),
        (GOOD, "transformers 5.23.0 (all): 1200 passed, 0 failed, 3 skipped in 61 s"),
        (BAD, "transformers 4.52.4 (quick): 40 passed, 2 failed, 1 skipped in 9 s [tests failed]"),
        (Record("5.0.0", "all", NO_ENVIRONMENT), "in 0 s [its environment could not be created]"),
        (Record("5.0.0", "all", TOO_LONG), "in 0 s [pytest did not end in time]"),
        (Record("5.0.0", "all", -9), "in 0 s [pytest ended with -9]"),
        (replace(GOOD, passed=0), "0 passed, 0 failed, 3 skipped in 61 s [no test passed]"),
    ],
)
def test_each_version_has_a_closing_line(record, wanted):
    assert report.line(record).endswith(wanted)


def test_all_failures_are_named_under_their_version():
    assert [*report.failures([BAD, GOOD])] == [report.line(BAD), "  tests/test_a.py::test_b[1]: assert 1 == 2"]


def test_reasons_are_added_up_over_the_versions():
    assert [*report.reasons([QUICK, GOOD])] == [
        "     3 on  2 of 2 versions: no sdpa",
        "     1 on  1 of 2 versions: no server",
    ]


@pytest.mark.parametrize(
    ("records", "wanted"),
    [
        ([GOOD, QUICK], "1240 passed, 0 failed, 4 skipped"),
        ([GOOD, BAD], "1240 passed, 2 failed, 4 skipped"),
        ([GOOD, Record("5.0.0", "all", -11)], "1200 passed, 1 failed, 3 skipped"),
    ],
)
def test_the_closing_line_counts_a_version_without_tests_as_a_failure(records, wanted):
    assert report.closing_line(records) == wanted


def test_a_table_of_a_text_is_replaced_and_nothing_else():
    text = "before\n<!-- matrix -->\nold\n<!-- /matrix -->\nafter\n<!-- torch -->\nold\n<!-- /torch -->\n"
    new = report.with_tables(text, {"matrix": "new"})
    assert new == text.replace("old", "new", 1)
    assert report.with_tables(new, {"matrix": "new"}) == new
    assert report.with_tables(text, {"torch": "new", "matrix": "new"}) == text.replace("old", "new")


@pytest.mark.parametrize("marks", ["", "<!-- matrix -->", "<!-- /matrix --><!-- matrix -->", "<!-- matrix -->" * 2])
def test_a_text_without_marks_for_the_table_is_refused(marks):
    with pytest.raises(ValueError, match="once, in this order"):
        report.with_tables(marks, {"matrix": "new"})


def asked(*arguments: str, root: str = "/r") -> dict[str, Run]:
    found = command_line.runs(command_line.parser().parse_args(["--root", root, *arguments]))
    assert len({run.version for run in found}) == len(found)
    return {run.version: run for run in found}


def suites(*arguments: str) -> dict[str, str]:
    return {version: run.suite for version, run in asked(*arguments).items()}


def test_with_no_version_all_run_the_whole_suite():
    assert suites() == suites("--all-full") == dict.fromkeys(VERSIONS, "all")


def test_versions_run_as_they_are_named():
    assert suites("--full", "5.0.0") == {"5.0.0": "all"}
    assert suites("--quick", "5.0.0", "5.99") == {"5.0.0": "quick", "5.99": "quick"}
    assert suites("--full", "5.0.0", "--quick") == {**dict.fromkeys(VERSIONS, "quick"), "5.0.0": "all"}
    assert suites("--quick", "5.0.0", "5.2.0", "--without", "5.2.0", "4.52.4") == {"5.0.0": "quick"}
    assert suites("--quick", "5.0.0", "--families") == {"5.0.0": "quick + families"}
    assert suites("--torch", "5.0.0", "--quick", "5.2.0") == {"5.0.0": "torch", "5.2.0": "quick"}


def test_the_suites_are_existing_paths():
    assert asked("--full", "5.0.0")["5.0.0"].paths[-len(runs.ALIKE) :] == runs.ALIKE
    for path in (*asked("--quick", "--families")["5.0.0"].paths, *asked("--torch", "5.0.0")["5.0.0"].paths):
        is_path = not path.startswith(("-", "not "))
        assert not is_path or (runs.CHECKOUT / path.partition("::")[0]).exists(), path
    assert asked("--only", "a", "b")["5.0.0"].paths == ("a", "b")


def test_an_invalid_version_is_refused(capsys):
    with pytest.raises(SystemExit):
        asked("--full", "newest")
    assert "newest" in capsys.readouterr().err


def test_the_versions_are_in_order():
    assert sorted(VERSIONS, key=Version) == [*VERSIONS]


@pytest.fixture
def pytest_runs(monkeypatch, tmp_path):
    """Replaces environments and runs by records; returns the runs, in order, and the records."""
    ran: list[Run] = []
    records = {"5.23.0": GOOD, "4.52.4": QUICK}

    def recorded(run: Run) -> Record:
        ran.append(run)
        return records.get(run.version, Record(run.version, run.suite, 0, passed=1))

    monkeypatch.setattr(runs, "prepare", lambda run: run.version != "5.0.0")
    monkeypatch.setattr(runs, "record", recorded)
    monkeypatch.setattr(command_line, "CHECKOUT", tmp_path)
    return ran, records


def run(*arguments: str) -> int:
    return command_line.main(["--jobs", "1", *arguments])


def test_the_longest_run_starts_first(pytest_runs):
    run("--full", "4.53.3", "4.54.1", "--quick", "5.3.0", "5.24.0")
    assert [run.version for run in pytest_runs[0]] == ["4.54.1", "4.53.3", "5.24.0", "5.3.0"]


def test_a_green_run_ends_with_0_and_the_closing_line(pytest_runs, capsys):
    assert run("--full", "5.23.0", "--quick", "4.52.4") == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "1240 passed, 0 failed, 4 skipped"
    assert report.table([QUICK, GOOD]) in out
    assert "Failed:" not in out


def test_a_failure_ends_with_1_and_is_named(pytest_runs, capsys):
    pytest_runs[1]["4.52.4"] = BAD
    assert run("--full", "5.23.0", "--quick", "4.52.4") == 1
    assert "tests/test_a.py::test_b[1]: assert 1 == 2" in capsys.readouterr().out


def test_an_environment_that_cannot_be_created_ends_with_1_and_runs_nothing(pytest_runs, capsys):
    assert run("--full", "5.23.0", "5.0.0") == 1
    assert [run.version for run in pytest_runs[0]] == ["5.23.0"]
    assert "5.0.0 (all): 0 passed, 0 failed, 0 skipped in 0 s [its environment could" in capsys.readouterr().out


def test_the_numbers_are_written_to_the_files_of_the_options(pytest_runs, tmp_path):
    (tmp_path / "compat").mkdir()
    (tmp_path / "compat" / "README.md").write_text("<!-- matrix -->\n<!-- /matrix -->")
    run("--full", "5.23.0", "4.52.4", "--json", str(tmp_path / "numbers"), "--readme")
    assert json.loads((tmp_path / "numbers").read_text()) == [asdict(QUICK), asdict(GOOD)]
    assert report.table([QUICK, GOOD]) in (tmp_path / "compat" / "README.md").read_text()


def test_earlier_numbers_are_added_to_the_new_ones(pytest_runs, tmp_path, capsys):
    old, older = tmp_path / "old", tmp_path / "older"
    older.write_text(json.dumps([asdict(replace(BAD, version="5.3.0"))]))
    old.write_text(json.dumps([asdict(BAD), asdict(replace(GOOD, version="5.3.0"))]))
    assert run("--quick", "4.52.4", "--with", str(older), str(old)) == 0
    assert report.table([QUICK, replace(GOOD, version="5.3.0")]) in capsys.readouterr().out
    assert run("--with", str(old)) == 1
    assert [run.version for run in pytest_runs[0]] == ["4.52.4"]


def test_two_records_of_one_version_with_another_torch_are_both_kept(pytest_runs, tmp_path, capsys):
    of_others = tmp_path / "others"
    of_others.write_text(json.dumps([asdict(OTHER), asdict(replace(OTHER, version="4.52.4"))]))
    assert run("--quick", "4.52.4", "--with", str(of_others)) == 0
    printed = capsys.readouterr().out
    assert report.table([QUICK]) in printed
    assert report.table_of_others([replace(OTHER, version="4.52.4"), OTHER]) in printed


def test_environments_of_another_torch_lie_apart(monkeypatch, tmp_path):
    for here, name in ((("2.13.2", "3.11"), ""), (("2.6.0", "3.11"), "torch-2.6.0-python-3.11")):
        monkeypatch.setattr(environments, "HERE", here)
        assert environments.root_in(tmp_path) == tmp_path / name


@pytest.mark.parametrize("is_made", [True, False])
def test_a_record_says_the_torch_and_the_python_of_its_run(is_made, monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "HERE", ("2.6.0", "3.10"))
    monkeypatch.setattr(runs, "prepare", lambda _: is_made)
    monkeypatch.setattr(runs.subprocess, "run", lambda *_, **__: Done(3))
    (found,) = runs.all_of([*asked("--torch", "5.0.0", root=str(tmp_path)).values()], jobs=1)
    assert (found.version, found.suite, found.torch, found.python) == ("5.0.0", "torch", "2.6.0", "3.10")
    assert found.is_beside_others


def test_a_run_has_its_own_files_and_no_network(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(runs.subprocess, "run", lambda command, **kwargs: calls.append((command, kwargs)) or Done(3))
    for name in ("5.0.0", "5.2.0"):
        assert runs.record(asked("--full", name, root=str(tmp_path))[name]).exit_code == 3
    (_, first), (command, second) = calls
    assert first["env"]["HF_HUB_OFFLINE"] == first["env"]["OMP_NUM_THREADS"] == "1"
    assert first["env"]["HF_HOME"] != second["env"]["HF_HOME"]
    assert command[0] == str(tmp_path / "5.2.0" / "bin" / "python")
    assert str(tmp_path / "scratch" / "5.2.0" / "junit.xml") in command


class Done:
    def __init__(self, returncode, stdout=""):
        self.returncode, self.stdout = returncode, stdout


@pytest.mark.parametrize(("found", "commands"), [("5.0.0", 0), ("5.2.0", 2)])
def test_an_environment_is_created_unless_it_imports_its_version(found, commands, monkeypatch, tmp_path):
    calls = []
    packages = environments.packages_of(tmp_path / "5.0.0")
    packages.mkdir(parents=True)
    monkeypatch.setattr(environments.subprocess, "run", lambda *_, **__: Done(0, f"a word before\n{found}\n"))
    monkeypatch.setattr(environments, "call", lambda *arguments, log: calls.append(arguments))
    with (tmp_path / "log").open("w") as log:
        assert environments.environment("5.0.0", tmp_path, log) == tmp_path / "5.0.0"
    assert len(calls) == commands
    assert str(environments.SHARED) in (packages / "_shared.pth").read_text()
