"""Trace files: they rotate, they stay readable after a killed process, and a full disk loses only spans."""

from pathlib import Path

import msgspec
import structlog
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode
from structlog.testing import capture_logs

from shared.observability.trace_files import FileExporter, SpanRow, read_spans, span_row

OK, FAILED = SpanExportResult.SUCCESS, SpanExportResult.FAILURE


def context(trace: int, span: int) -> SpanContext:
    return SpanContext(trace, span, is_remote=False)


def span(number: int, name: str = "claim") -> ReadableSpan:
    return ReadableSpan(name, context=context(7, number), start_time=number, end_time=number + 1)


def numbers(rows: list[SpanRow]) -> list[int]:
    return [int(row.span_id, 16) for row in rows]


def everything(folder: Path) -> list[SpanRow]:
    return list(read_spans(folder, [b"{"]))


def test_a_span_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    made = ReadableSpan(
        "write order",
        context=context(0xABC, 0xDEF),
        parent=context(0xABC, 0x123),
        kind=SpanKind.CLIENT,
        attributes={"text": 'ü\n"', "number": 3, "flag": True},
        links=[Link(context(0x1, 0x2))],
        status=Status(StatusCode.ERROR, "too bad"),
        start_time=1_700_000_000_123_456_789,
        end_time=1_700_000_000_123_456_790,
    )
    assert FileExporter(tmp_path / "deep" / "orders-1.jsonl", max_bytes=10_000, keep=1).export([made]) is OK
    (row,) = everything(tmp_path / "deep")
    assert (row.trace_id, row.span_id, row.parent_id) == (f"{0xABC:032x}", f"{0xDEF:016x}", f"{0x123:016x}")
    assert (row.name, row.kind, row.error) == ("write order", "client", "too bad")
    assert (row.start_ns, row.end_ns) == (1_700_000_000_123_456_789, 1_700_000_000_123_456_790)
    assert row.attributes == {"text": 'ü\n"', "number": 3, "flag": True}
    assert row.links == [(f"{1:032x}", f"{2:016x}")]


def test_files_rotate_by_size_and_the_oldest_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "orders-1.jsonl"
    one = len(msgspec.json.encode(span_row(span(1)))) + 1
    exporter = FileExporter(path, max_bytes=3 * one + 50, keep=2)
    for number in range(1, 21):
        assert exporter.export([span(number)]) is OK
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "orders-1.jsonl",
        "orders-1.jsonl.1",
        "orders-1.jsonl.2",
    ]
    assert all(file.stat().st_size <= 3 * one + 50 for file in tmp_path.iterdir())
    held = {
        file.suffix: [msgspec.json.decode(line, type=SpanRow) for line in file.open()] for file in tmp_path.iterdir()
    }
    assert numbers(held[".2"]) + numbers(held[".1"]) + numbers(held[".jsonl"]) == list(range(13, 21))
    assert sorted(numbers(everything(tmp_path))) == list(range(13, 21))


def test_only_the_current_file_stays_if_no_older_files_are_kept(tmp_path: Path) -> None:
    exporter = FileExporter(tmp_path / "orders-1.jsonl", max_bytes=1, keep=0)
    for number in (1, 2, 3):
        exporter.export([span(number)])
    assert numbers(everything(tmp_path)) == [3]
    assert len(list(tmp_path.iterdir())) == 1


def test_an_unfinished_last_line_of_a_killed_process_hides_no_other_span(tmp_path: Path) -> None:
    path = tmp_path / "orders-1.jsonl"
    exporter = FileExporter(path, max_bytes=10_000, keep=1)
    exporter.export([span(1), span(2)])
    with path.open("ab") as file:
        file.write(msgspec.json.encode(span_row(span(3)))[:-20])
    FileExporter(tmp_path / "worker-1.jsonl", max_bytes=10_000, keep=1).export([span(4)])
    assert numbers(everything(tmp_path)) == [1, 2, 4]
    exporter.export([span(5), span(6)])  # a restarted process continues the same file
    assert numbers(everything(tmp_path)) == [1, 2, 5, 6, 4]


def test_only_matching_spans_are_read(tmp_path: Path) -> None:
    FileExporter(tmp_path / "orders-1.jsonl", max_bytes=10_000, keep=1).export([span(1, "claim"), span(2, "reveal")])
    assert numbers(list(read_spans(tmp_path, [b"reveal"]))) == [2]
    assert list(read_spans(tmp_path, [b"nothing"])) == []
    assert list(read_spans(tmp_path / "missing", [b"{"])) == []


def test_a_full_disk_is_logged_once_and_again_after_a_recovery(tmp_path: Path) -> None:
    path = tmp_path / "orders-1.jsonl"
    path.symlink_to("/dev/full")
    exporter = FileExporter(path, max_bytes=10_000, keep=1)
    before = structlog.get_config()
    structlog.configure(cache_logger_on_first_use=False)
    try:
        with capture_logs() as logs:
            assert [exporter.export([span(1)]) for _ in range(3)] == [FAILED] * 3
            assert [line["event"] for line in logs] == ["traces_not_written"]
            assert "No space left" in logs[0]["error"]
            path.unlink()
            assert exporter.export([span(2)]) is OK
            path.unlink()
            path.symlink_to("/dev/full")
            assert [exporter.export([span(3)]) for _ in range(2)] == [FAILED] * 2
            assert len(logs) == 2
    finally:
        structlog.configure(**before)
