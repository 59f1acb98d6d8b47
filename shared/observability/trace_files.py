"""Trace files for a system without a collector: one span per line, rotated by size.

    {"trace_id", "span_id", "parent_id", "name", "kind", "service", "start_ns", "end_ns", "attributes", "links",
     "error"}

Times are nanoseconds since 1970, and `links` are pairs [trace id, span id]. Each process writes a separate file,
`<service>-<instance>.jsonl`; older files end in `.1`, `.2` and so on. The files may be read at any time, because each
line is written as a whole."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import msgspec
import structlog
from msgspec import Struct
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import StatusCode

log = structlog.get_logger(__name__)


class SpanRow(Struct, kw_only=True):
    trace_id: str
    span_id: str
    name: str
    start_ns: int
    end_ns: int
    parent_id: str | None = None
    kind: str = "internal"
    service: str = ""
    attributes: dict[str, Any] = {}
    links: list[tuple[str, str]] = []
    error: str | None = None


class FileExporter(SpanExporter):
    """Writes spans in the thread of the span processor. If the disk is full, spans are lost but no request fails. The
    log reports this once."""

    def __init__(self, path: Path, *, max_bytes: int, keep: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._keep = keep
        self._failed = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        lines = b"".join(msgspec.json.encode(span_row(span)) + b"\n" for span in spans)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.exists() and self._path.stat().st_size + len(lines) > self._max_bytes:
                self._rotate()
            with open(self._path, "ab+", opener=_private) as file:
                file.write(b"\n" + lines if _cut_short(file) else lines)
        except OSError as error:
            if not self._failed:
                log.error("traces_not_written", path=str(self._path), error=str(error))
            self._failed = True
            return SpanExportResult.FAILURE
        self._failed = False
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """Does nothing, because no file stays open."""

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return True

    def _rotate(self) -> None:
        self._older(self._keep).unlink(missing_ok=True)
        for number in range(self._keep - 1, 0, -1):
            if self._older(number).exists():
                self._older(number).rename(self._older(number + 1))
        if self._keep:
            self._path.rename(self._older(1))
        else:
            self._path.unlink()

    def _older(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")


def _private(path: str, flags: int) -> int:
    """Creates a file that only its owner may read: spans name restaurants, orders and routes."""
    return os.open(path, flags, mode=0o600)


def _cut_short(file: IO[bytes]) -> bool:
    """Returns whether the last line is incomplete, because of a kill or a full disk. The next span must then begin on a
    new line."""
    if not file.tell():
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


def span_row(span: ReadableSpan) -> SpanRow:
    """Returns the row of a span in a trace file."""
    context, parent = span.context, span.parent
    assert context is not None
    assert span.start_time is not None
    assert span.end_time is not None
    return SpanRow(
        trace_id=f"{context.trace_id:032x}",
        span_id=f"{context.span_id:016x}",
        parent_id=f"{parent.span_id:016x}" if parent else None,
        name=span.name,
        kind=span.kind.name.lower(),
        service=str(span.resource.attributes.get("service.name", "")),
        start_ns=span.start_time,
        end_ns=span.end_time,
        attributes=dict(span.attributes or {}),
        links=[(f"{link.context.trace_id:032x}", f"{link.context.span_id:016x}") for link in span.links],
        error=_error(span),
    )


def _error(span: ReadableSpan) -> str | None:
    if span.status.status_code is not StatusCode.ERROR:
        return None
    return span.status.description or str((span.attributes or {}).get("error.type", "error"))


def read_spans(folder: Path, ids: Sequence[bytes]) -> Iterator[SpanRow]:
    """Yields the spans whose line contains one of `ids` (trace ids, or an id among the attributes). Skips unreadable
    lines, such as the last line of a killed process."""
    for path in sorted(folder.glob("*.jsonl*")):
        try:
            lines = path.read_bytes().splitlines()
        except FileNotFoundError:
            continue  # the file was rotated a moment ago
        for line in lines:
            if any(text in line for text in ids):
                try:
                    yield msgspec.json.decode(line, type=SpanRow)
                except msgspec.DecodeError:
                    continue
