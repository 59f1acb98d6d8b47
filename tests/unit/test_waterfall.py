"""The waterfall: the tree of spans, the waits in it, and incomplete traces."""

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from rich.console import Console

from deploy.local.port_check import find_free
from services.sync.cli.trace_search import DeadChange, FoundTraces, TracedChange, find_traces
from services.sync.cli.waterfall import WaterfallLine, as_json, lines_of, render
from shared.observability.trace_files import SpanRow
from shared.settings import Settings

ORDER = "5e8d7a52-8a9c-4ad1-9d0f-0a3f2f6a4b11"
TRACE, OTHER_TRACE = "0af7651916cd43dd8448eb211c80319c", "1bf7651916cd43dd8448eb211c80319c"
MS = 1_000_000
AT = datetime(2026, 3, 14, 12, 30, tzinfo=UTC)


def span(name: str, began: float, ended: float, *, id_: str = "", parent: str | None = None, **fields: Any) -> SpanRow:
    """A span with times in milliseconds; its id is its name by default."""
    chosen = {"trace_id": TRACE, "service": "ticketrail-orders", **fields}
    return SpanRow(
        span_id=id_ or name, parent_id=parent, name=name, start_ns=int(began * MS), end_ns=int(ended * MS), **chosen
    )


def change(**fields: Any) -> TracedChange:
    chosen: dict[str, Any] = {
        "change_id": "c-1",
        "version": 1,
        "type": "ticketrail.order.created.v1",
        "source": "orders",
        "accepted_at": AT,
        "written_at": AT + timedelta(milliseconds=12.5),
        "traceparent": f"00-{TRACE}-b7ad6b7169203331-01",
    }
    return TracedChange(**{**chosen, **fields})


def shown(*changes: TracedChange, spans: list[SpanRow], missing: list[str] | None = None, width: int = 180) -> str:
    screen = Console(file=StringIO(), width=width)
    screen.print(render(ORDER, FoundTraces(list(changes), spans, missing or []), screen.width))
    assert isinstance(screen.file, StringIO)
    return screen.file.getvalue()


def outline(lines: list[WaterfallLine]) -> list[tuple[int, str]]:
    return [(line.depth, line.name) for line in lines]


WHOLE = [
    span("push order_created", 9, 9.5, parent="send", service="ticketrail-notifier"),
    span("reveal", 4, 5, parent="POST /api/orders"),
    span(
        "write order",
        12,
        15,
        parent="send",
        service="ticketrail-sync-worker",
        attributes={"messaging.destination.name": "sync.postgres.critical.v1", "ticketrail.batch.changes": 7},
    ),
    span("POST /api/orders", 0, 5.2, attributes={"http.response.status_code": 201, "ticketrail.order_id": ORDER}),
    span("send", 2, 4, parent="record", attributes={"ticketrail.message.changes": 3}, kind="producer"),
    span("record", 1, 4, parent="POST /api/orders"),
    span("claim", 0.5, 1, parent="POST /api/orders"),
    span("another", 0, 1, trace_id=OTHER_TRACE),
]


def test_lines_follow_the_tree_and_siblings_are_sorted_by_start() -> None:
    assert outline(lines_of(WHOLE, TRACE)) == [
        (0, "POST /api/orders"),
        (1, "claim"),
        (1, "record"),
        (2, "send"),
        (3, "· waits"),
        (3, "push order_created"),
        (3, "· waits"),
        (3, "write order"),
        (1, "reveal"),
    ]


def test_a_wait_is_shown_between_the_span_that_sent_and_the_span_that_received() -> None:
    lines = lines_of(WHOLE, TRACE)
    waits = lines[6]
    assert (waits.waits, waits.where) == (True, "critical.v1")
    assert (waits.start_ns, waits.end_ns) == (4 * MS, 12 * MS)
    assert not any(line.waits for line in lines if line.name == "claim")


def test_a_message_that_did_not_wait_has_no_row_of_waiting() -> None:
    lines = lines_of([span("send", 0, 2), span("mirror order", 2.05, 3, parent="send")], TRACE)
    assert outline(lines) == [(0, "send"), (1, "mirror order")]
    early = lines_of([span("send", 0, 2), span("write order", 1, 3, parent="send")], TRACE)
    assert outline(early) == [(0, "send"), (1, "write order")], (
        "a wait is shown although the message was received before the publisher confirm"
    )


def test_a_span_without_its_parent_is_at_the_top_level() -> None:
    lines = lines_of([span("write order", 12, 15, parent="gone"), span("mirror order", 3, 4, parent="gone")], TRACE)
    assert outline(lines) == [(0, "mirror order"), (0, "write order")]


def test_a_repeated_span_is_one_line() -> None:
    assert len(lines_of([WHOLE[3], WHOLE[3]], TRACE)) == 1


def test_notes_count_the_changes_that_shared_the_message_and_the_batch() -> None:
    notes = {line.name: line.note for line in lines_of(WHOLE, TRACE)}
    assert notes["send"] == "3 in its message"
    assert notes["write order"] == "7 in its batch"
    assert notes["POST /api/orders"] == "201"


# -- the screen --------------------------------------------------------------------------------------------------


def test_the_screen_has_a_section_for_each_change_with_its_trace() -> None:
    second = change(change_id="c-2", version=2, type="ticketrail.order.deleted.v1", traceparent=None)
    text = shown(change(), second, spans=WHOLE)
    assert text.index("ticketrail.order.created.v1  version 1  by orders") < text.index("ticketrail.order.deleted.v1")
    assert "in PostgreSQL after 12.5 ms" in text
    assert f"trace {TRACE}" in text
    assert "trace unknown" in text
    assert "this change has no trace" in text
    assert "sync-worker" in text
    assert "░" in text
    assert "█" in text


def test_a_change_without_spans_states_the_reason() -> None:
    assert "not sampled (TICKETRAIL_TRACE_SAMPLE)" in shown(change(), spans=[])


def test_a_failed_span_shows_its_error_before_its_note() -> None:
    failed = span("write order", 0, 3, error="transient: DeadlockDetectedError", attributes={"ticketrail.attempt": 2})
    assert "transient: DeadlockDetectedError, attempt 2" in shown(change(), spans=[failed])


def test_a_trace_of_the_order_is_shown_although_postgres_has_no_change_of_it() -> None:
    text = shown(spans=WHOLE, missing=["PostgreSQL is unavailable"])
    assert f"not in PostgreSQL (yet)  trace {TRACE}" in text
    assert "! PostgreSQL is unavailable" in text
    assert OTHER_TRACE not in text


def test_json_has_the_same_content_and_each_span_once() -> None:
    found = FoundTraces([change(traceparent=f"00-{OTHER_TRACE}-b7ad6b7169203331-00")], WHOLE, ["x"])
    made = as_json(ORDER, found)
    (only,) = made["changes"]
    assert (only["trace_id"], [one.name for one in only["spans"]]) == (OTHER_TRACE, ["another"])
    (elsewhere,) = made["elsewhere"]
    assert (elsewhere["trace_id"], len(elsewhere["spans"])) == (TRACE, 7)
    assert made["missing"] == ["x"]
    assert as_json(ORDER, FoundTraces([change()], WHOLE, []))["elsewhere"] == []


def test_a_dead_letter_is_shown_once_with_or_without_its_spans() -> None:
    def dead_change(id_: str, trace: str) -> DeadChange:
        kind, queue = "ticketrail.order.created.v1", "sync.postgres.critical.dead.v1"
        return DeadChange(id_, "c-1", 1, kind, queue, "contract_broken", "total: below 0", "open", AT, trace)

    found = FoundTraces(
        [], WHOLE, [], [dead_change("one", TRACE), dead_change("two", "2bf7651916cd43dd8448eb211c80319c")]
    )
    output = StringIO()
    screen = Console(file=output, width=180)
    screen.print(render(ORDER, found, screen.width))
    text = output.getvalue()
    assert text.count("dead, open") == 2
    assert text.count("POST /api/orders") == 1
    assert text.index("ticketrail dlq show one") < text.index("POST /api/orders") < text.index("dlq show two")
    assert "not in PostgreSQL (yet)" not in text
    hostile = dead_change("three", TRACE)
    hostile.error = "\x1b[2J gone"
    screen.print(render(ORDER, FoundTraces([], [], [], [hostile]), screen.width))
    assert "\x1b" not in output.getvalue(), "text from outside controls the terminal"
    made = as_json(ORDER, found)
    assert [(one["id"], len(one["spans"])) for one in made["dead_letters"]] == [("one", 7), ("two", 0)]
    assert made["elsewhere"] == []


# -- Jaeger ------------------------------------------------------------------------------------------------------


def tags(**values: Any) -> list[dict[str, Any]]:
    return [{"key": name.replace("__", "."), "type": "string", "value": value} for name, value in values.items()]


def reference(kind: str, trace: str, span_id: str) -> dict[str, str]:
    return {"refType": kind, "traceID": trace, "spanID": span_id}


def in_jaeger(trace: str, id_: str, name: str, *references: dict[str, str], **values: Any) -> dict[str, Any]:
    return {
        "traceID": trace,
        "spanID": id_,
        "operationName": name,
        "references": list(references),
        "startTime": 1_700_000_000_000_000,
        "duration": 1_500,
        "tags": tags(**values),
        "processID": "p1",
    }


PROCESSES = {"p1": {"serviceName": "ticketrail-orders", "tags": []}}
# Jaeger leaves leading zeros out of ids.
SHORT = "00" + TRACE[2:]
STORED = {
    SHORT: [
        in_jaeger(SHORT[2:], "7ad6b7169203331", "POST /api/orders", span__kind="server", ticketrail__order_id=ORDER),
        in_jaeger(
            SHORT[2:],
            "c0ffee0000000001",
            "write order",
            reference("CHILD_OF", SHORT[2:], "7ad6b7169203331"),
            reference("FOLLOWS_FROM", OTHER_TRACE, "beef000000000001"),
            otel__status_code="ERROR",
            otel__status_description="transient: gone",
        ),
    ],
    OTHER_TRACE: [in_jaeger(OTHER_TRACE, "beef000000000001", "process", error=True, error__type="changes_failed")],
}


class _Jaeger(BaseHTTPRequestHandler):
    """Answers like Jaeger's query API: by tags, and by trace id."""

    broken = False

    def do_GET(self) -> None:
        asked = urlsplit(self.path)
        found = None
        if asked.path == "/api/traces" and json.loads(parse_qs(asked.query)["tags"][0])["ticketrail.order_id"] == ORDER:
            found = STORED[SHORT]
        else:
            found = STORED.get(asked.path.rpartition("/")[2])
        body = json.dumps({"data": [{"spans": found, "processes": PROCESSES}]}) if found else '{"errors": []}'
        if self.broken:
            body = "<html>"
        self.send_response(200 if found else 404)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def jaeger() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Jaeger)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()
    _Jaeger.broken = False


def without_postgres(url: str) -> Settings:
    nowhere = f"postgresql://nobody@127.0.0.1:{find_free(1)[0]}/none"
    return Settings(_env_file=None, database_writer_url=nowhere, trace_query_url=url)


async def test_jaeger_gives_the_spans_of_the_order_and_of_the_linked_batches(jaeger: str) -> None:
    found = await find_traces(without_postgres(jaeger), ORDER)
    root, written, batch = found.spans
    assert (root.trace_id, root.span_id, root.parent_id) == (SHORT, "07ad6b7169203331", None)
    assert (root.kind, root.service) == ("server", "ticketrail-orders")
    assert root.end_ns - root.start_ns == 1_500_000
    assert (written.parent_id, written.links) == (root.span_id, [(OTHER_TRACE, "beef000000000001")])
    assert (written.error, batch.error, root.error) == ("transient: gone", "changes_failed", None)
    assert batch.trace_id == OTHER_TRACE
    assert outline(lines_of(found.spans, SHORT)) == [(0, "POST /api/orders"), (1, "write order")]
    assert "PostgreSQL is unavailable" in found.missing[0]


async def test_a_jaeger_that_answers_garbage_is_named_and_hides_no_other_problem(jaeger: str) -> None:
    _Jaeger.broken = True
    found = await find_traces(without_postgres(jaeger), ORDER)
    assert found.spans == []
    assert [jaeger in text for text in found.missing] == [False, True]


async def test_an_unavailable_jaeger_is_named() -> None:
    url = f"http://127.0.0.1:{find_free(1)[0]}"
    assert f"{url} gave no traces" in (await find_traces(without_postgres(url), ORDER)).missing[1]


@pytest.mark.parametrize("width", [60, 70, 80, 100, 180])
def test_names_and_times_are_whole_at_every_width(width: int) -> None:
    spans = [
        span("POST /api/orders", 0, 16_390.1),
        span("send order.created", 1, 12_345.6, parent="POST /api/orders"),
        span("write order", 12_350, 16_361.7, parent="send order.created", service="ticketrail-sync-worker"),
    ]
    rows = shown(change(), spans=spans, width=width).splitlines()
    for text in ("POST /api/orders", "16390.1", "send order.created", "12344.6", "write order", "12350.0", "4011.7"):
        assert any(text in row for row in rows), (text, rows)
    assert any("took ms" in row for row in rows)
    assert all(len(row) <= width for row in rows[3:])
