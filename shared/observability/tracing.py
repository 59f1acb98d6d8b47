"""Traces of requests and changes as OpenTelemetry spans, sampled at the end of the work.

During the work, only its times are noted, as tuples (`Trace.note`, `span`). At the end of the work the spans are made
and exported if the trace is sampled, failed or slow. Otherwise the times are dropped. This keeps the accept path cheap,
and sampling loses no errors. One limit remains: if an unsampled trace becomes slow only in the sync worker, the spans
of its request are already gone. If that matters, sample everything and let the collector decide about whole traces
(docs/tracing.md).

    orders    POST /api/orders ─ claim ─ record ─ send ticketrail.changes ─ reveal
    worker                                              ├─ write order   (linked to the batch's own span)
                                                        └─ mirror order
    notifier                                            └─ push order_created

A change carries the context of its `send` span (W3C `traceparent`). This holds for changes that a request, a drainer or
the claim finisher sends. Spans use OpenTelemetry's semantic conventions for HTTP, messaging and databases.
"""

import random
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from shared.errors import described
from shared.observability.trace_files import FileExporter
from shared.settings import Settings
from shared.version import VERSION

# An id that consists of zeros is invalid (W3C Trace Context).
_TRACEPARENT = re.compile(r"^00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})\Z")
_ERROR_TYPE = re.compile(r"([\w.]+)(?:: |\Z)")
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_ERROR = StatusCode.ERROR
_NO_ATTRIBUTES: Mapping[str, Any] = {}
_SAMPLE_RANGE = 1 << 64


_Noted = tuple[str, SpanKind, int, int, Mapping[str, Any], str | None, str | None, str | None]


class Trace:
    """One piece of work in this process: its trace context and the spans noted so far."""

    __slots__ = ("attributes", "kept", "noted", "parent", "sampled", "span_id", "started", "trace_id")

    def __init__(self, trace_id: str, parent: str | None, *, sampled: bool, kept: bool) -> None:
        self.trace_id = trace_id
        self.parent = parent
        """The span id of the caller; None if the trace begins in this process."""
        self.sampled = sampled
        self.kept = kept
        """False if tracing is off, so that `note` does nothing."""
        self.span_id = new_span_id()
        self.started = time.time_ns()
        self.attributes: dict[str, Any] = {}
        """Attributes of this work's own span that are known before the work ends."""
        self.noted: list[_Noted] = []

    @property
    def traceparent(self) -> str:
        return self.context_of(self.span_id)

    def context_of(self, span_id: str) -> str:
        return f"00-{self.trace_id}-{span_id}-{'01' if self.sampled else '00'}"

    def note(
        self,
        name: str,
        began: int,
        ended: int,
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Mapping[str, Any] = _NO_ATTRIBUTES,
        error: str | None = None,
        span_id: str | None = None,
        parent: str | None = None,
    ) -> None:
        """Notes a span below `parent`; the default is this work's own span. `began`, `ended`: nanoseconds since 1970.
        `error`: "type: text" or only the type. `span_id`: the id, if another span already refers to it."""
        if self.kept:
            self.noted.append((name, kind, began, ended, attributes, error, span_id, parent))


_current: ContextVar[Trace | None] = ContextVar("trace", default=None)


def current() -> Trace | None:
    return _current.get()


@contextmanager
def attached(trace: Trace | None) -> Iterator[None]:
    """Makes `trace` the current trace in a `with` block. Pass None for work that belongs to no trace."""
    token = _current.set(trace)
    try:
        yield
    finally:
        _current.reset(token)


def begun() -> Trace:
    """Returns the current trace. If a request is refused before a tracer has seen it, makes a new trace, which only
    provides an id."""
    trace = _current.get()
    if trace is None:
        trace = Trace(_new_trace_id(), None, sampled=False, kept=False)
        _current.set(trace)
    return trace


def _new_trace_id() -> str:
    return f"{random.getrandbits(128) or 1:032x}"


def new_span_id() -> str:
    return f"{random.getrandbits(64) or 1:016x}"


class span:
    """Notes the time of a `with` block in the current trace, and its exception as the span's error."""

    __slots__ = ("_attributes", "_began", "_kind", "_name", "_trace")

    def __init__(
        self, name: str, *, kind: SpanKind = SpanKind.INTERNAL, attributes: Mapping[str, Any] = _NO_ATTRIBUTES
    ) -> None:
        self._name = name
        self._kind = kind
        self._attributes = attributes

    def __enter__(self) -> None:
        self._trace = _current.get()
        self._began = time.time_ns()

    def __exit__(self, type_: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._trace is not None:
            text = None if error is None else described(error)
            self._trace.note(
                self._name, self._began, time.time_ns(), kind=self._kind, attributes=self._attributes, error=text
            )


class Tracer:
    """Samples and exports traces. Each process has one tracer. Make it inside the process that serves, because its
    exporter has a thread. `close` flushes the exporter."""

    def __init__(self, service: str, settings: Settings) -> None:
        self._ratio = settings.trace_sample
        self._below = int(settings.trace_sample * _SAMPLE_RANGE)
        self._slow_ns = int(settings.trace_slow_ms * 1_000_000)
        self._slow_left = self._slow_per_second = settings.trace_slow_per_second
        self._second = 0
        self._resource = Resource.create(
            {
                "service.name": f"ticketrail-{service}",
                "service.version": VERSION,
                "service.instance.id": f"{service}-{settings.instance}",
            }
        )
        self._processor: BatchSpanProcessor | None = None
        if self.on:
            self._processor = BatchSpanProcessor(
                _exporter(service, settings), max_queue_size=16_384, schedule_delay_millis=500
            )

    @property
    def on(self) -> bool:
        """False if `trace_sample` is 0, which switches tracing off completely."""
        return self._ratio > 0

    def begin(self) -> Trace:
        """Begins a trace and makes it the current trace of this task."""
        trace_id = _new_trace_id()
        trace = Trace(trace_id, None, sampled=self.on and self._chosen(trace_id), kept=self.on)
        _current.set(trace)
        return trace

    def continue_from(self, trace: Trace, traceparent: str) -> None:
        """Makes a trace that has begun the continuation of the caller's trace, unless `traceparent` is not valid. Call
        it only for a caller who has proved who it is: the caller decides whether the trace is sampled."""
        if found := _TRACEPARENT.match(traceparent):
            trace.trace_id, trace.parent = found[1], found[2]
            trace.sampled = self.on and (found[3][1] in "13579bdf" or self._chosen(found[1]))

    def end(
        self,
        trace: Trace,
        name: str,
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Mapping[str, Any] = _NO_ATTRIBUTES,
        error: str | None = None,
    ) -> None:
        """Ends the work. Exports its spans if the trace is sampled, failed or slow."""
        if not trace.kept:
            return
        ended = time.time_ns()
        if not (
            trace.sampled or error is not None or (ended - trace.started > self._slow_ns and self._may_keep_slow())
        ):
            return
        self._export(
            trace.trace_id,
            trace.span_id,
            trace.parent,
            name,
            kind,
            trace.started,
            ended,
            {**attributes, **trace.attributes},
            error,
        )
        for part, part_kind, began, part_ended, noted, part_error, span_id, parent in trace.noted:
            self._export(
                trace.trace_id,
                span_id or new_span_id(),
                parent or trace.span_id,
                part,
                part_kind,
                began,
                part_ended,
                noted,
                part_error,
            )

    def will_export(self, traceparent: str | None, *, slow_ns: int = 0) -> bool:
        """Returns whether a span of this change will be exported: its trace is sampled, or the change has already taken
        so long that it counts as slow. `slow_ns`: the time so far, in nanoseconds. Call it before you build attributes.
        """
        if self._processor is None or not traceparent:
            return False
        return traceparent[-1] in "13579bdf" or (slow_ns > self._slow_ns and self._may_keep_slow())

    def add(
        self,
        traceparent: str | None,
        name: str,
        began: int,
        ended: int,
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Mapping[str, Any] = _NO_ATTRIBUTES,
        error: str | None = None,
        links: Iterable[str | None] = (),
        span_id: str | None = None,
    ) -> str | None:
        """Exports a finished span below `traceparent`, or in a new trace if that is None. Returns the span's own
        traceparent, or None if it was not exported. `links`: traceparents; unreadable ones are skipped."""
        if self._processor is None:
            return None
        found = _TRACEPARENT.match(traceparent) if traceparent else None
        if traceparent and found is None:  # the contract allows any text, so this may not be a trace context
            return None
        trace_id = found[1] if found else _new_trace_id()
        span_id = span_id or new_span_id()
        self._export(trace_id, span_id, found[2] if found else None, name, kind, began, ended, attributes, error, links)
        return f"00-{trace_id}-{span_id}-01"

    def close(self) -> None:
        """Exports the remaining spans, which takes a few seconds at most. May be called twice."""
        processor, self._processor = self._processor, None
        if processor is not None:
            processor.shutdown()  # type: ignore[no-untyped-call]

    # -- inside ------------------------------------------------------------------------------------------------

    def _chosen(self, trace_id: str) -> bool:
        """Returns whether a trace is sampled. Decides like OpenTelemetry's TraceIdRatioBased, by the lower half of the
        trace id, so that every process decides in the same way."""
        return int(trace_id[16:], 16) < self._below

    def _may_keep_slow(self) -> bool:
        """Returns whether another slow trace may be kept in this second. After an outage the whole backlog is slow, and
        traces must not make it slower."""
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._slow_left = second, self._slow_per_second
        self._slow_left -= 1
        return self._slow_left >= 0

    def _export(
        self,
        trace_id: str,
        span_id: str,
        parent: str | None,
        name: str,
        kind: SpanKind,
        began: int,
        ended: int,
        attributes: Mapping[str, Any],
        error: str | None,
        links: Iterable[str | None] = (),
    ) -> None:
        if self._processor is None:
            return
        status = Status()
        if error is not None:
            type_ = found[1] if (found := _ERROR_TYPE.match(error)) else "_OTHER"
            attributes = {**attributes, "error.type": type_}
            status = Status(_ERROR, error[:500] if error != type_ else None)
        self._processor.on_end(
            ReadableSpan(
                name,
                context=_context(trace_id, span_id),
                parent=_context(trace_id, parent) if parent else None,
                resource=self._resource,
                attributes=attributes,
                links=[Link(context) for link in links if (context := _linked(link))],
                kind=kind,
                status=status,
                start_time=began,
                end_time=ended,
            )
        )


def trace_id_of(traceparent: str | None) -> str | None:
    found = _TRACEPARENT.match(traceparent) if traceparent else None
    return found[1] if found else None


def _context(trace_id: str, span_id: str) -> SpanContext:
    return SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=False, trace_flags=_SAMPLED)


def _linked(traceparent: str | None) -> SpanContext | None:
    found = _TRACEPARENT.match(traceparent) if traceparent else None
    return _context(found[1], found[2]) if found else None


def _exporter(service: str, settings: Settings) -> SpanExporter:
    if settings.otlp_endpoint:
        # Imported here, because the import takes 80 ms.
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter(endpoint=f"{settings.otlp_endpoint.rstrip('/')}/v1/traces")
    path = settings.traces_path / f"{service}-{settings.instance}.jsonl"
    return FileExporter(path, max_bytes=settings.trace_file_bytes, keep=settings.trace_files)
