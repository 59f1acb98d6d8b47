"""A pytest plugin that writes the outcomes of a run into the JSON file that TICKETRAIL_OUTCOMES names; see
`retry_failed`.

`passed` and `failed` are lists of node ids. `broken` is a list of sentences about problems other than failed tests,
which no second try excuses, such as a collection error or a crashed worker. The plugin writes the file at the end of
the session; a run that dies earlier leaves no file.
"""

import json
import os
from pathlib import Path

import pytest

FILE_VARIABLE = "TICKETRAIL_OUTCOMES"
_PHASES = ("setup", "call", "teardown")


class Outcomes:
    def __init__(self, file: Path) -> None:
        self._file = file
        self._passed: set[str] = set()
        self._failed: dict[str, None] = {}  # a dict keeps the order in which the tests failed
        self._broken: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when not in _PHASES:  # pytest-xdist reports the test of a crashed worker this way
            self._broken.append(f"{report.nodeid}: {report.longreprtext}")
        elif report.failed:
            self._failed[report.nodeid] = None
        elif report.passed and report.when == "call":
            self._passed.add(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._broken.append(f"{report.nodeid} cannot be collected")

    def pytest_internalerror(self, excrepr: object) -> None:
        self._broken.append(f"pytest itself failed: {excrepr}")

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        self._broken.append(f"the run was stopped: {excinfo.exconly()}")  # by Ctrl-C, or by pytest.exit in a test

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: object, error: object) -> None:
        if error:
            self._broken.append(f"a worker ended: {error}")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if stopped := session.shouldfail or session.shouldstop:
            self._broken.append(f"the run stopped before its end: {stopped}")
        passed = sorted(self._passed - self._failed.keys())
        self._file.write_text(json.dumps({"passed": passed, "failed": list(self._failed), "broken": self._broken}))


def pytest_configure(config: pytest.Config) -> None:
    file = os.environ.get(FILE_VARIABLE)
    # A worker of pytest-xdist needs no plugin, because the controller gets the reports of all workers.
    if file and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(Path(file)))
