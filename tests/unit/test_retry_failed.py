"""`tests/retry_failed.py`: the exit code after each kind of run, the tests that run again, and the list of second
tries."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec import Struct

from tests import retry_failed

WORKERS = ("-p", "xdist", "-n", "1")
PASSES = "def test_that_passes(): pass\n"
FAILS = "def test_that_fails(): assert False\n"
FAILS_ONCE = """
from pathlib import Path
def test_that_fails_once():
    first = not Path("was-here").exists()
    Path("was-here").touch()
    assert not first
"""
SKIPS_AFTERWARDS = FAILS_ONCE.replace("    assert not first", "    if not first: pytest.skip()\n    assert False")


class Run(Struct):
    code: int
    out: str
    second_tries: str

    @property
    def repeated(self) -> bool:
        return "run once more" in self.out


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """Returns a function that runs pytest on a file with the given text, in a folder of its own."""
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -p no:cacheprovider\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # importing all plugins would take longer than the tests
    for name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
        monkeypatch.delenv(name, raising=False)

    def run(text: str, *arguments: str) -> Run:
        (tmp_path / "test_it.py").write_text(f"import pytest\n{text}")
        code = retry_failed.main(arguments, logs=tmp_path / "logs")
        listed = tmp_path / "logs" / retry_failed.SECOND_TRIES
        return Run(code, capsys.readouterr().out, listed.read_text() if listed.exists() else "")

    return run


@pytest.mark.parametrize("workers", [(), WORKERS], ids=["one process", "workers"])
def test_a_test_that_fails_once_passes_and_is_listed_as_a_bug(run: Any, workers: tuple[str, ...]) -> None:
    seen = run(PASSES + FAILS_ONCE, *workers)
    assert seen.code == 0
    assert "failed, then passed: test_it.py::test_that_fails_once" in seen.out
    assert seen.second_tries.startswith("test_it.py::test_that_fails_once")
    first_log = Path(next(line for line in seen.out.splitlines() if line.startswith("first log: "))[11:])
    assert "assert not" in first_log.read_text()
    assert "1 failed, 1 passed" in seen.out
    assert "= 1 passed in" in seen.out  # the second run consists of the failed test


def test_a_test_that_fails_twice_fails_the_run(run: Any) -> None:
    seen = run(FAILS + FAILS_ONCE)
    assert seen.code == 1
    assert "failed, then failed again: test_it.py::test_that_fails\n" in seen.out
    assert "failed, then passed: test_it.py::test_that_fails_once" in seen.out
    assert "test_that_fails_once" in seen.second_tries


def test_a_run_without_failures_repeats_nothing(run: Any) -> None:
    seen = run(PASSES)
    assert (seen.code, seen.repeated, seen.second_tries) == (0, False, "")


def test_a_test_that_is_skipped_at_its_second_try_fails_the_run(run: Any) -> None:
    seen = run(SKIPS_AFTERWARDS)
    assert (seen.code, seen.repeated, seen.second_tries) == (1, True, "")


def test_an_error_in_a_fixture_is_repeated_like_a_failure(run: Any) -> None:
    broken = "@pytest.fixture\ndef it(): yield; assert False\ndef test_it(it): pass\n"
    seen = run(broken)
    assert (seen.code, seen.repeated) == (1, True)


@pytest.mark.parametrize(
    ("text", "arguments", "code"),
    [
        (PASSES + "import nothing_of_this_name\n", (), 2),
        (PASSES + "import nothing_of_this_name\n", WORKERS, 1),
        (PASSES, ("-k", "no_such_test"), 5),
        (PASSES, ("--no-such-option",), 4),
        (FAILS_ONCE + "def test_that_crashes(): import os; os._exit(9)\n", (), 9),
        (FAILS_ONCE + "def test_that_crashes(): import os; os._exit(0)\n", (), 1),
        (FAILS_ONCE + "def test_that_crashes(): import os; os._exit(9)\n", WORKERS, 1),
        (FAILS_ONCE + "def test_that_stops(): pytest.exit('stopped', 1)\n", (), 1),
        (FAILS_ONCE + PASSES, ("-x",), 1),
        ("@pytest.mark.parametrize('n', range(21))\ndef test_many(n): assert False\n", (), 1),
    ],
    ids=[
        "collection error",
        "collection error in a worker",
        "no test",
        "usage error",
        "crash",
        "crash that claims success",
        "crash of a worker",
        "exit",
        "stopped at the first failure",
        "more failures than a stall explains",
    ],
)
def test_a_problem_that_no_stall_explains_fails_without_a_second_try(
    run: Any, text: str, arguments: tuple[str, ...], code: int
) -> None:
    seen = run(text, *arguments)
    assert (seen.code, seen.repeated, seen.second_tries) == (code, False, "")
    assert "FAILED" in seen.out
    assert "first.log" in seen.out


def test_a_worker_that_ends_between_tests_fails_the_run(run: Any) -> None:
    ends = "@pytest.fixture(scope='module', autouse=True)\ndef it():\n    yield\n    import os; os._exit(9)\n"
    seen = run(ends + PASSES, *WORKERS)
    assert seen.code != 0
    assert not seen.repeated


def test_the_second_run_uses_this_python(run: Any) -> None:
    seen = run(FAILS_ONCE + f"    import sys; assert sys.executable == {sys.executable!r}\n")
    assert seen.code == 0
