"""Traces: which traces are kept, the parents of spans, and contexts that cannot be parsed."""

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace.sampling import TraceIdRatioBased
from opentelemetry.trace import SpanKind

from shared.observability import tracing
from shared.observability.trace_files import SpanRow, read_spans
from shared.observability.tracing import Trace, Tracer
from shared.settings import Settings

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-00"
MIN_SHARE = 1e-12
"""A share so small that no trace is ever sampled by chance."""

MakeTracer = Callable[..., Tracer]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[MakeTracer]:
    made: list[Tracer] = []

    def tracer(service: str = "orders", **settings: Any) -> Tracer:
        chosen = {"home": tmp_path, "trace_slow_ms": 60_000, **settings}
        made.append(Tracer(service, Settings(_env_file=None, **chosen)))
        return made[-1]

    yield tracer
    for one in made:
        one.close()


@pytest.fixture(autouse=True)
def no_current_trace() -> Iterator[None]:
    with tracing.attached(None):
        yield


def kept(tracer: Tracer, home: Path) -> list[SpanRow]:
    """Closes the tracer, so that it exports nothing more, and returns the spans that it wrote."""
    tracer.close()
    return list(read_spans(home / "traces", [b"{"]))


def ids(count: int) -> list[str]:
    chance = random.Random(20260314)
    return [f"{chance.getrandbits(128):032x}" for _ in range(count)]


def old(trace: Trace, seconds: float) -> Trace:
    trace.started -= int(seconds * 1e9)
    return trace


# -- sampling ----------------------------------------------------------------------------------------------------


def continued(tracer: Tracer, traceparent: str) -> Trace:
    """Returns the trace of a caller who has proved who it is."""
    trace = tracer.begin()
    tracer.continue_from(trace, traceparent)
    return trace


def test_the_sampled_share_of_traces_matches_the_setting(make: MakeTracer) -> None:
    tracer = make(trace_sample=0.25)
    sampled = sum(continued(tracer, f"00-{id_}-{SPAN}-00").sampled for id_ in ids(4_000))
    assert 900 < sampled < 1_100
    assert 0 < sum(tracer.begin().sampled for _ in range(400)) < 400


def test_every_process_samples_the_same_traces_as_opentelemetry(make: MakeTracer) -> None:
    orders, worker, tenth = make(trace_sample=0.5), make("worker", trace_sample=0.5), make(trace_sample=0.1)
    standard = TraceIdRatioBased(0.5)
    for id_ in ids(200):
        context = f"00-{id_}-{SPAN}-00"
        chosen = continued(orders, context).sampled
        assert chosen == continued(worker, context).sampled
        assert chosen == standard.should_sample(None, int(id_, 16), "any").decision.is_sampled()
        assert chosen or not continued(tenth, context).sampled


@pytest.mark.parametrize("flags", ["01", "03", "ff"])
def test_a_trace_that_the_caller_samples_is_kept(make: MakeTracer, tmp_path: Path, flags: str) -> None:
    tracer = make(trace_sample=MIN_SHARE)
    trace = continued(tracer, f"00-{TRACE}-{SPAN}-{flags}")
    assert trace.traceparent == f"00-{TRACE}-{trace.span_id}-01"
    tracer.end(trace, "GET /x", kind=SpanKind.SERVER)
    (row,) = kept(tracer, tmp_path)
    assert (row.trace_id, row.parent_id, row.span_id) == (TRACE, SPAN, trace.span_id)
    assert (row.name, row.kind, row.service) == ("GET /x", "server", "ticketrail-orders")


def test_tracing_that_is_off_keeps_nothing_and_still_passes_the_trace_id_on(make: MakeTracer, tmp_path: Path) -> None:
    tracer = make(trace_sample=0)
    trace = old(continued(tracer, SAMPLED), 3600)
    with tracing.span("part"):
        pass
    tracer.end(trace, "GET /x", error="500")
    assert tracer.add(SAMPLED, "write order", 1, 2, error="bad") is None
    assert not tracer.will_export(SAMPLED, slow_ns=1 << 62)
    assert (trace.trace_id, trace.noted, trace.traceparent[-2:]) == (TRACE, [], "00")
    assert kept(tracer, tmp_path) == []
    assert not (tmp_path / "traces").exists()


def test_a_trace_that_is_not_sampled_failed_or_slow_is_dropped(make: MakeTracer, tmp_path: Path) -> None:
    tracer = make(trace_sample=MIN_SHARE)
    trace = continued(tracer, UNSAMPLED)
    with tracing.span("part"):
        pass
    tracer.end(trace, "GET /x")
    assert not tracer.will_export(UNSAMPLED)
    assert kept(tracer, tmp_path) == []


def test_a_failed_trace_is_kept_with_all_its_spans_although_it_is_not_sampled(make: MakeTracer, tmp_path: Path) -> None:
    tracer = make(trace_sample=MIN_SHARE)
    trace = continued(tracer, UNSAMPLED)
    with pytest.raises(OSError, match="gone"), tracing.span("claim", kind=SpanKind.CLIENT):
        raise OSError("gone")
    tracer.end(trace, "PUT /x", error="503")
    root, part = kept(tracer, tmp_path)
    assert (root.name, root.error, root.attributes) == ("PUT /x", "503", {"error.type": "503"})
    assert (part.name, part.parent_id, part.error) == ("claim", trace.span_id, "OSError: gone")
    assert part.attributes == {"error.type": "OSError"}


def test_an_error_without_a_type_gets_the_type_other(make: MakeTracer, tmp_path: Path) -> None:
    tracer = make()
    tracer.add(SAMPLED, "write order", 1, 2, error="the disk is full")
    (row,) = kept(tracer, tmp_path)
    assert (row.error, row.attributes) == ("the disk is full", {"error.type": "_OTHER"})


def test_a_slow_trace_is_kept_although_it_is_not_sampled(make: MakeTracer, tmp_path: Path) -> None:
    tracer = make(trace_sample=MIN_SHARE, trace_slow_ms=500)
    tracer.end(old(continued(tracer, UNSAMPLED), 0.4), "quick")
    tracer.end(old(continued(tracer, UNSAMPLED), 0.6), "slow")
    assert not tracer.will_export(UNSAMPLED, slow_ns=400_000_000)
    assert tracer.will_export(UNSAMPLED, slow_ns=600_000_000)
    assert [row.name for row in kept(tracer, tmp_path)] == ["slow"]


def test_slow_traces_are_limited_per_second_and_the_next_second_takes_new_ones(make: MakeTracer) -> None:
    tracer = make(trace_sample=MIN_SHARE, trace_slow_ms=1, trace_slow_per_second=3)

    def keeps_slow_trace() -> bool:
        return tracer.will_export(UNSAMPLED, slow_ns=1 << 60)

    assert sum(keeps_slow_trace() for _ in range(200)) in (3, 6)  # 6 if a new second began in between
    assert all(tracer.will_export(SAMPLED) for _ in range(200)), "the limit applies to sampled traces"
    deadline = time.monotonic() + 10
    while not keeps_slow_trace():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# -- contexts ----------------------------------------------------------------------------------------------------

UNREADABLE = [
    "",
    "nonsense",
    "00-xyz-b7ad6b7169203331-01",
    f"00-{TRACE.upper()}-{SPAN}-01",
    f"00-{'0' * 32}-{SPAN}-01",
    f"00-{TRACE}-{'0' * 16}-01",
    f"00-{TRACE}-{SPAN}-01\n",
    f"ff-{TRACE}-{SPAN}-01",
    f"00-{TRACE}-{SPAN}",
]


@pytest.mark.parametrize("context", UNREADABLE)
def test_an_invalid_context_begins_a_new_trace(make: MakeTracer, context: str) -> None:
    trace = continued(make(trace_sample=MIN_SHARE), context)
    assert (trace.parent, trace.sampled) == (None, False)
    assert trace.trace_id != TRACE
    assert tracing.trace_id_of(trace.traceparent) == trace.trace_id
    assert tracing.trace_id_of(context) is None


@pytest.mark.parametrize("context", UNREADABLE[1:])
def test_no_span_has_an_invalid_context_as_its_parent(make: MakeTracer, tmp_path: Path, context: str) -> None:
    tracer = make()
    assert tracer.add(context, "write order", 1, 2) is None
    tracer.add(None, "process", 1, 2, links=[context, SAMPLED, None])
    (row,) = kept(tracer, tmp_path)
    assert (row.name, row.parent_id, row.links) == ("process", None, [(TRACE, SPAN)])


def test_every_trace_without_a_context_has_its_own_ids(make: MakeTracer) -> None:
    tracer = make()
    begun = [tracer.begin() for _ in range(100)]
    assert len({trace.trace_id for trace in begun}) == len({trace.span_id for trace in begun}) == 100
    assert all(trace.traceparent[36:52] == trace.span_id for trace in begun)


def test_a_request_refused_before_its_trace_begins_gets_one_stable_id() -> None:
    assert tracing.current() is None
    assert tracing.begun() is tracing.begun() is tracing.current()
    assert not tracing.begun().kept


# -- spans -------------------------------------------------------------------------------------------------------


def test_notes_become_spans_below_the_trace_or_below_the_parent_that_they_name(
    make: MakeTracer, tmp_path: Path
) -> None:
    tracer = make()
    trace = continued(tracer, SAMPLED)
    own, record = tracing.new_span_id(), tracing.new_span_id()
    trace.note("record", 10, 40, span_id=record)
    trace.note("send", 20, 30, kind=SpanKind.PRODUCER, attributes={"n": 2}, span_id=own, parent=record)
    trace.attributes["ticketrail.change_id"] = "c"
    tracer.end(trace, "POST /x", attributes={"http.route": "/x"})
    root, recorded, sent = kept(tracer, tmp_path)
    assert root.attributes == {"http.route": "/x", "ticketrail.change_id": "c"}
    assert (recorded.span_id, recorded.parent_id, recorded.start_ns, recorded.end_ns) == (record, trace.span_id, 10, 40)
    assert (sent.span_id, sent.parent_id, sent.kind, sent.attributes) == (own, record, "producer", {"n": 2})
    assert {row.trace_id for row in (root, recorded, sent)} == {TRACE}


def test_a_finished_span_is_a_child_of_its_context_and_returns_its_own_context(
    make: MakeTracer, tmp_path: Path
) -> None:
    tracer = make("sync-worker", instance=3)
    batch = tracer.add(None, "process", 5, 6, kind=SpanKind.CONSUMER, links=[SAMPLED])
    assert batch is not None
    written = tracer.add(UNSAMPLED, "write order", 5, 6, links=[batch])
    first, second = kept(tracer, tmp_path)
    assert batch == f"00-{first.trace_id}-{first.span_id}-01"
    assert (first.parent_id, first.links) == (None, [(TRACE, SPAN)])
    assert (second.trace_id, second.parent_id) == (TRACE, SPAN)
    assert second.links == [(first.trace_id, first.span_id)]
    assert written == f"00-{TRACE}-{second.span_id}-01"
    assert [path.name for path in (tmp_path / "traces").iterdir()] == ["sync-worker-3.jsonl"]


def test_a_span_without_a_trace_does_nothing_and_raises_its_exception() -> None:
    with pytest.raises(KeyError), tracing.span("claim"):
        raise KeyError
    assert tracing.current() is None


def test_a_closed_tracer_makes_no_spans_and_can_be_closed_twice(make: MakeTracer, tmp_path: Path) -> None:
    tracer = make()
    trace = continued(tracer, SAMPLED)
    tracer.close()
    tracer.end(trace, "late")
    assert tracer.add(SAMPLED, "late", 1, 2) is None
    assert kept(tracer, tmp_path) == []
