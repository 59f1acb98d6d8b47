"""The results that a benchmark run writes and reads back, and the settings of the systems that it measures."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from benchmarks.__main__ import QUESTIONS, answer
from benchmarks.load import ProgramMissing
from benchmarks.peers.node import install_packages
from benchmarks.question import BenchmarkPlan, ResultRow, compared, not_run
from benchmarks.report import markdown_table
from benchmarks.results import merged, read_rows, write_rows
from benchmarks.rig import BenchmarkRig
from shared.errors import TooManyRequests
from shared.http.limits import Limits
from shared.settings import Settings


@pytest.fixture
def rig() -> Iterator[BenchmarkRig]:
    rig = BenchmarkRig()
    yield rig
    shutil.rmtree(rig.folder)


def fail(sentence: str) -> None:
    raise AssertionError(sentence)


def test_rows_of_a_missing_peer_are_read_back(tmp_path: Path) -> None:
    rows = [
        compared("push", "200 events", "throughput", "deliveries/s", [3.0], "Socket.IO", [1.0], at_least=1.5),
        not_run("push", "200 events", "nginx with nchan", "not installed", "≥ 0.5×"),
    ]
    write_rows(tmp_path / "results.json", rows, {})
    assert read_rows(tmp_path / "results.json", fail) == rows


def test_null_figures_of_an_earlier_run_are_read(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text(
        '{"machine": {}, "rows": [{"question": "push", "case": "c", "metric": "", "unit": "", "ours": null,'
        ' "peer": "nchan", "theirs": null, "ratio": null, "target": "", "met": null, "samples_ours": [null],'
        ' "samples_theirs": [], "note": "not run: missing", "a_field_of_another_version": 1}]}'
    )
    (row,) = read_rows(file, fail)
    assert row.ours is None
    assert row.note == "not run: missing"


def test_an_invalid_row_is_dropped_with_a_warning(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    good = compared("read", "case", "throughput", "reads/s", [2.0])
    file.write_bytes(b'{"machine": {}, "rows": [{"question": 5},' + msgspec.json.encode(good) + b"]}")
    warnings: list[str] = []
    assert read_rows(file, warnings.append) == [good]
    assert len(warnings) == 1
    assert "row 0" in warnings[0]


def test_a_truncated_file_is_reported_and_replaced(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text('{"machine": {}, "rows": [{"quest')
    warnings: list[str] = []
    assert read_rows(file, warnings.append) == []
    assert "not a results file" in warnings[0]


def test_a_run_replaces_only_the_results_of_its_own_questions() -> None:
    earlier = [compared(name, "case", "m", "u", [1.0]) for name in ("read", "accept", "an earlier question")]
    new = [compared("accept", "case", "m", "u", [2.0])]
    found = merged(earlier, new, QUESTIONS)
    assert [(row.question, row.ours) for row in found] == [("accept", 2.0), ("read", 1.0)]


def test_a_peer_that_did_not_run_is_a_line_of_the_table() -> None:
    table = markdown_table([not_run("accept", "burst", "Express + pg", "no Node", "≥ 3.5×")], {"cores": 2})
    assert "| accept | burst |   |  | Express + pg |  |  | ≥ 3.5× |  |" in table
    assert "not run: no Node" in table


@pytest.mark.parametrize(
    ("error", "failed"), [(ProgramMissing("install wrk"), []), (RuntimeError("a stream ended"), ["read"])]
)
def test_a_question_that_fails_does_not_end_the_run(
    monkeypatch: pytest.MonkeyPatch, error: Exception, failed: list[str]
) -> None:
    def run(*_: Any) -> list[ResultRow]:
        raise error

    monkeypatch.setattr("importlib.import_module", lambda _: SimpleNamespace(run=run))
    failed_questions: list[str] = []
    (row,) = answer("read", cast(BenchmarkRig, None), BenchmarkPlan(), failed_questions)
    assert failed_questions == failed
    assert str(error) in row.note


async def test_benchmarks_run_without_rate_limits(rig: BenchmarkRig, monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask_until_refused(settings: Settings) -> None:
        limits = Limits(None, settings)
        for _ in range(2 * max(settings.restaurant_burst_requests, settings.address_burst_requests)):
            await limits.of_restaurant("r", [])
            await limits.of_address("127.0.0.1", [])

    for name, value in rig.environment().items():
        if name.startswith("TICKETRAIL_"):
            monkeypatch.setenv(name, value)
    await ask_until_refused(Settings(_env_file=None))
    with pytest.raises(TooManyRequests):
        await ask_until_refused(Settings(_env_file=None, restaurant_requests_per_second=5.0))


def test_services_under_load_keep_a_tenth_of_their_traces(rig: BenchmarkRig, monkeypatch: pytest.MonkeyPatch) -> None:
    # The default in development would distort the measurement.
    assert Settings.model_construct().trace_sample == 1
    monkeypatch.setenv("TICKETRAIL_TRACE_SAMPLE", rig.environment()["TICKETRAIL_TRACE_SAMPLE"])
    assert Settings(_env_file=None).trace_sample == 0.1


def test_node_peers_without_node_are_reported_as_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ProgramMissing, match="Node is not installed"):
        install_packages(tmp_path)


def test_a_failed_installation_of_packages_leaves_no_folder_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, script in (("node", ""), ("npm", "/bin/mkdir node_modules; echo offline >&2; exit 1")):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ProgramMissing, match="offline"):
        install_packages(tmp_path)
    assert not (tmp_path / "node_modules").exists()
