"""One trace per change across real processes: the parents of spans, the sampling, and the search."""

import asyncio
import gzip
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from deploy.local.port_check import find_free
from shared.entities.contract import encode
from shared.entities.order import ENTITY as ORDER
from shared.messaging import topology
from shared.mirror.claim_replies import Claimed
from shared.mirror.mirror import Mirror
from shared.observability.trace_files import SpanRow, read_spans
from shared.observability.tracing import trace_id_of
from shared.version import VERSION
from tests.rigs import builders
from tests.rigs.http_client import http_client
from tests.rigs.notifier import Screen
from tests.rigs.servers import Servers
from tests.rigs.system import System, eventually

pytestmark = pytest.mark.timeout(150)

SEND = f"send {topology.CHANGES}:critical"
QUEUE = "sync.postgres.critical.v1"
# The spans of a new order, and the service of each.
PLACED = {
    "POST /api/orders": "orders",
    "claim": "orders",
    "record": "orders",
    SEND: "orders",
    "reveal": "orders",
    "write order": "sync-worker",
    "mirror order": "sync-worker",
    "push order_created": "notifier",
}
FAILURES = """
create sequence failures;
grant usage, select on failures to ticketrail_writer;
create function fail() returns trigger language plpgsql as $$
begin
    if new.notes = 'doomed' then
        raise exception 'never' using errcode = 'serialization_failure';
    end if;
    if new.notes = 'unlucky' then  -- fails in its batch and alone, so it passes two retry queues at least
        if nextval('failures') <= 3 then
            raise exception 'try again' using errcode = 'serialization_failure';
        end if;
    end if;
    return new;
end $$;
create trigger fail before insert or update on orders for each row execute function fail();
"""


@pytest.fixture(scope="module")
async def traced(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[System]:
    """A system that keeps only traces that the caller samples or that fail. It samples none by chance and treats none
    as slow."""
    own_redis = await asyncio.to_thread(servers.extra_redis)
    system = System(
        servers,
        tmp_path_factory.mktemp("traces"),
        redis=own_redis,
        trace_sample="1e-12",
        trace_slow_ms=600_000,
        reconcile_interval_seconds=0.5,
        publish_concurrency=1,
    )
    try:
        await system.up()
        async with system.database("ticketrail_owner") as connection:
            await connection.execute(FAILURES)
        yield system
    finally:
        await system.down()
        await asyncio.to_thread(own_redis.discard)


class Caller:
    """The trace context of a caller."""

    def __init__(self, *, sampled: bool = True) -> None:
        self.trace, self.span = uuid4().hex, uuid4().hex[:16]
        self.headers = {"traceparent": f"00-{self.trace}-{self.span}-{'01' if sampled else '00'}"}


def written(system: System, trace: str) -> list[SpanRow]:
    rows = read_spans(system.directory / "traces", [trace.encode()])
    return [row for row in rows if row.trace_id == trace]


async def spans_of(system: System, trace: str, *names: str, times: int = 1) -> dict[str, SpanRow]:
    """Waits until each name occurs `times` times; returns the first span of each name."""

    async def look() -> list[SpanRow]:
        return written(system, trace)

    def enough(rows: list[SpanRow]) -> bool:
        return all(sum(row.name == name for row in rows) >= times for name in names)

    rows = await eventually(look, within=30, what=f"{names} in {trace}", until=enough)
    return {row.name: row for row in reversed(rows)}


def links_to(system: System, span: SpanRow) -> list[SpanRow]:
    """Returns the batch spans that link to the span."""
    rows = read_spans(system.directory / "traces", [span.span_id.encode()])
    return [row for row in rows if (span.trace_id, span.span_id) in row.links and row.trace_id != span.trace_id]


async def place(system: System, caller: Caller, *, service: str = "orders", **fields: Any) -> str:
    async with system.client(service=service) as client:
        answer = await client.post("/api/orders", json=system.order_body(**fields), headers=caller.headers)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["data"]["id"])


async def stored(system: System, id_: str) -> None:
    async def look() -> bool:
        return id_ in await system.stored_orders()

    await eventually(look, what=f"{id_} in PostgreSQL")


def logged(system: System, name: str, event: str) -> list[dict[str, Any]]:
    lines = (system.directory / f"{name}.log").read_text().splitlines()
    return [line for text in lines if text.startswith("{") and (line := json.loads(text)).get("event") == event]


# -- one trace ---------------------------------------------------------------------------------------------------


async def test_order_has_one_trace_from_the_request_to_the_push(traced: System) -> None:
    caller = Caller()
    id_ = await place(traced, caller)
    spans = await spans_of(traced, caller.trace, *PLACED)
    assert {name: span.service.removeprefix("ticketrail-") for name, span in spans.items()} == PLACED
    assert len(written(traced, caller.trace)) == len(PLACED), "a span is missing or occurs twice"
    root, record, send = spans["POST /api/orders"], spans["record"], spans[SEND]
    parents = {name: span.parent_id for name, span in spans.items()}
    assert parents == {
        "POST /api/orders": caller.span,
        "claim": root.span_id,
        "record": root.span_id,
        SEND: record.span_id,
        "reveal": root.span_id,
        "write order": send.span_id,
        "mirror order": send.span_id,
        "push order_created": send.span_id,
    }
    assert all(span.start_ns <= span.end_ns and span.error is None for span in spans.values())
    kinds = {name: span.kind for name, span in spans.items()}
    assert (kinds["POST /api/orders"], kinds["claim"], kinds[SEND]) == ("server", "client", "producer")
    assert root.attributes["http.route"] == root.attributes["url.path"] == "/api/orders"
    assert root.attributes["http.response.status_code"] == 201
    assert root.attributes["ticketrail.order_id"] == spans["write order"].attributes["ticketrail.order_id"] == id_
    assert send.attributes["messaging.destination.name"] == f"{topology.CHANGES}:critical"
    change_ids = {span.attributes.get("ticketrail.change_id") for span in spans.values()} - {None}
    assert len(change_ids) == 1


async def test_batch_write_is_a_span_with_links_to_its_changes(traced: System) -> None:
    caller = Caller()
    await place(traced, caller)
    spans = await spans_of(traced, caller.trace, SEND, "write order")
    (batch,) = links_to(traced, spans[SEND])
    assert (batch.name, batch.kind, batch.parent_id) == (f"process {QUEUE}", "consumer", None)
    assert batch.attributes["messaging.operation.type"] == "process"
    assert batch.attributes["messaging.batch.message_count"] >= 1
    assert spans["write order"].links == [(batch.trace_id, batch.span_id)]
    assert (batch.start_ns, batch.end_ns) == (spans["write order"].start_ns, spans["write order"].end_ns)


async def test_changes_in_one_message_keep_their_traces_and_the_batch_links_to_each(traced: System) -> None:
    for _ in range(20):
        callers = [Caller() for _ in range(24)]
        await asyncio.gather(*(place(traced, caller) for caller in callers))
        found = [await spans_of(traced, caller.trace, *PLACED) for caller in callers]
        messages: dict[tuple[int, int], list[dict[str, SpanRow]]] = {}
        for spans in found:
            messages.setdefault((spans[SEND].start_ns, spans[SEND].end_ns), []).append(spans)
        together = max(messages.values(), key=len)
        if len(together) > 1:
            break
    else:
        raise AssertionError("no two changes shared a message")
    assert {spans[SEND].attributes["ticketrail.message.changes"] for spans in together} == {len(together)}
    for spans in found:
        assert spans[SEND].parent_id == spans["record"].span_id
        assert {spans[name].parent_id for name in ("write order", "mirror order", "push order_created")} == {
            spans[SEND].span_id
        }
    batches = {(batch.trace_id, batch.span_id) for spans in together for batch in links_to(traced, spans[SEND])}
    assert len(batches) == 1, "the changes of one message were written in several batches"


async def test_push_event_carries_the_trace_id(traced: System) -> None:
    caller = Caller()
    async with traced.client(service="notifier") as client, client.stream("GET", "/api/v1/sync/events") as response:
        screen = Screen(response)
        listening = asyncio.create_task(screen.listen())
        await screen.until(lambda: bool(screen.events))
        id_ = await place(traced, caller)
        await screen.until(lambda: any(event.data.get("orderID") == id_ for event in screen.events))
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
    (event,) = (event for event in screen.events if event.data.get("orderID") == id_)
    assert event.data["traceId"] == caller.trace
    spans = await spans_of(traced, caller.trace, "push order_created")
    assert spans["push order_created"].attributes["ticketrail.push.subscribers"] == 1


# -- search ------------------------------------------------------------------------------------------------------


async def test_trace_command_shows_the_trace_of_each_change_of_an_order(traced: System) -> None:
    callers = [Caller() for _ in range(3)]
    id_ = await place(traced, callers[0])
    async with traced.client() as client:
        changed = await client.put(f"/api/orders/{id_}", json={"status": "received"}, headers=callers[1].headers)
        deleted = await client.delete(f"/api/orders/{id_}", headers=callers[2].headers)
    assert (changed.status_code, deleted.status_code) == (200, 200)
    for caller, push in zip(callers, ("order_created", "stage_change", "order_deleted"), strict=True):
        await spans_of(traced, caller.trace, "write order", "mirror order", f"push {push}", "reveal")

    shown = json.loads(await traced.cli("trace", id_, "--json"))
    assert shown["order_id"] == id_
    assert (shown["elsewhere"], shown["missing"]) == ([], [])
    assert [(change["version"], change["trace_id"]) for change in shown["changes"]] == [
        (version, caller.trace) for version, caller in enumerate(callers, start=1)
    ]
    roots = [change["spans"] for change in shown["changes"]]
    assert [next(span["name"] for span in spans if span["kind"] == "server") for spans in roots] == [
        "POST /api/orders",
        "PUT /api/orders/{order_id}",
        "DELETE /api/orders/{order_id}",
    ]
    assert all(len(spans) == len(PLACED) for spans in roots)

    text = await traced.cli("trace", id_)
    assert [text.index(caller.trace) for caller in callers] == sorted(text.index(caller.trace) for caller in callers)
    for name in ("order.created.v1", "order.status_changed.v1", "order.deleted.v1", "push stage_change", "write order"):
        assert name in text


async def test_unknown_order_is_an_error(traced: System) -> None:
    # The trace of this request names an id that no order has.
    async with traced.client() as client:
        unknown = str(uuid4())
        caller = Caller()
        assert (await client.get(f"/api/orders/{unknown}", headers=caller.headers)).status_code == 404
    await spans_of(traced, caller.trace, "GET /api/orders/{order_id}")
    # The command ends with exit code 1 and this message.
    with pytest.raises(AssertionError, match="no change, no dead letter and no trace"):
        await traced.cli("trace", unknown)


# -- sampling ----------------------------------------------------------------------------------------------------


async def test_unsampled_traces_without_errors_are_not_written(traced: System) -> None:
    silent, loud = Caller(sampled=False), Caller()
    id_ = await place(traced, silent)
    await stored(traced, id_)
    async with traced.client() as client:
        # A 404 is a reply and not an error.
        assert (await client.get(f"/api/orders/{uuid4()}", headers=silent.headers)).status_code == 404
    await place(traced, loud)
    await spans_of(traced, loud.trace, *PLACED)  # the traces of the earlier requests would be written by now
    assert written(traced, silent.trace) == []
    assert "not sampled" in await traced.cli("trace", id_)


async def test_each_attempt_of_a_retried_change_is_kept_without_sampling(traced: System) -> None:
    caller = Caller(sampled=False)
    id_ = await place(traced, caller, notes="unlucky")
    await stored(traced, id_)
    await spans_of(traced, caller.trace, "write order", times=2)
    failed = written(traced, caller.trace)
    assert {span.name for span in failed} == {"write order"}
    assert [span.attributes["ticketrail.attempt"] for span in failed] == list(range(1, len(failed) + 1))
    for span in failed:
        assert span.error is not None
        assert span.error.startswith("transient: SerializationError")
        assert span.attributes["error.type"] == "transient"
        ((batch_trace, batch),) = span.links
        (process,) = (row for row in written(traced, batch_trace) if row.span_id == batch)
        assert process.attributes["error.type"] == "changes_failed"
        assert (caller.trace, span.parent_id) in process.links
    assert "attempt 2" in await traced.cli("trace", id_)


async def test_dead_letter_is_found_by_its_order_and_its_log_lines_by_its_trace(traced: System) -> None:
    caller = Caller(sampled=False)
    id_ = await place(traced, caller, notes="doomed")
    await spans_of(traced, caller.trace, "write order", times=4)

    async def lines() -> list[dict[str, Any]]:
        return [line for line in logged(traced, "worker", "change_failed") if line.get("trace_id") == caller.trace]

    found = await eventually(lines, what="four failures in the log", until=lambda seen: len(seen) >= 4)
    assert [line["attempt"] for line in found] == [1, 2, 3, 4]
    assert {line["subject"] for line in found} == {f"order/{id_}"}
    assert found[-1]["queue"] == "sync.postgres.critical.dead.v1"
    shown = json.loads(await traced.cli("trace", id_, "--json"))
    assert shown["changes"] == []

    async def looked_up() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(await traced.cli("trace", id_, "--json"))
        return found

    shown = await eventually(looked_up, what="the dead letter", until=lambda seen: seen["dead_letters"])
    assert shown["elsewhere"] == []
    (dead_letter,) = shown["dead_letters"]
    assert (dead_letter["trace_id"], dead_letter["status"], dead_letter["version"]) == (caller.trace, "open", 1)
    assert [span["attributes"]["ticketrail.attempt"] for span in dead_letter["spans"]] == [1, 2, 3, 4]
    assert f"ticketrail dlq show {dead_letter['id']}" in await traced.cli("trace", id_)


async def test_failed_request_is_kept_without_sampling(traced: System) -> None:
    id_ = await place(traced, Caller(sampled=False))
    await stored(traced, id_)
    await asyncio.to_thread(traced.redis.kill)
    try:
        async with traced.client() as client:
            answer = await client.put(f"/api/orders/{id_}", json={"status": "received"})
    finally:
        await asyncio.to_thread(traced.redis.start)
    assert answer.status_code == 503
    trace = answer.json()["error"]["trace_id"]
    root = (await spans_of(traced, trace, "PUT /api/orders/{order_id}"))["PUT /api/orders/{order_id}"]
    assert root.parent_id is None
    assert (root.error, root.attributes["error.type"]) == ("503", "503")
    assert root.attributes["http.response.status_code"] == 503
    await eventually(traced.warm, within=30, what="a warm mirror again", until=lambda state: state == "warm")


# -- other paths -------------------------------------------------------------------------------------------------


async def test_journaled_order_keeps_its_trace(traced: System) -> None:
    caller = Caller()
    await asyncio.to_thread(traced.servers.rabbitmq.freeze)
    try:
        async with traced.client() as client:
            answer = await client.post("/api/orders", json=traced.order_body(), headers=caller.headers)
    finally:
        await asyncio.to_thread(traced.servers.rabbitmq.thaw)
    assert answer.json()["data"]["durability"] == "journal", answer.text
    spans = await spans_of(traced, caller.trace, "POST /api/orders", "journal", "write order", "push order_created")
    journal = spans["journal"]
    assert (journal.kind, journal.error) == ("producer", None)

    async def from_journal() -> list[SpanRow]:
        return [row for row in written(traced, caller.trace) if row.attributes.get("ticketrail.from_journal")]

    (sent,) = await eventually(from_journal, within=30, what="the publish from the journal")
    assert (sent.name, sent.parent_id, sent.kind) == (SEND, journal.span_id, "client")
    assert spans["write order"].parent_id == spans["push order_created"].parent_id == journal.span_id
    (doubt,) = (row for row in written(traced, caller.trace) if row.name == SEND and row.error)
    assert doubt.attributes["error.type"] == "InDoubt"
    assert doubt.span_id != journal.span_id
    (line,) = (line for line in logged(traced, "orders", "record_in_doubt") if line.get("trace_id") == caller.trace)
    assert line["changes"] == 1
    for name in ("orders", "worker", "notifier"):
        await traced.ready(name)


async def test_finished_claim_shows_in_the_trace_of_its_change(traced: System) -> None:
    await eventually(traced.warm, within=30, what="a warm mirror", until=lambda state: state == "warm")
    caller = Caller(sampled=False)
    order = builders.order(items=1, order_number="", restaurant_id=traced.restaurant_id)
    left = builders.change(order, traceparent=caller.headers["traceparent"])
    mirror = Mirror(traced.redis.url, timeout=5.0, stale_seconds=2.0)
    try:  # the owner of the claim dies here
        reply = await mirror.claim(ORDER, left, encode(left), None, order.business_day.isoformat())
    finally:
        await mirror.close()
    assert isinstance(reply, Claimed)
    finished = (await spans_of(traced, caller.trace, "finish claim"))["finish claim"]
    assert (finished.service, finished.parent_id) == ("ticketrail-sync-worker", caller.span)
    assert finished.attributes["ticketrail.change_id"] == left.id
    await stored(traced, order.id)
    assert "finish claim" in await traced.cli("trace", order.id)


# -- export ------------------------------------------------------------------------------------------------------


class _Collector(BaseHTTPRequestHandler):
    received: list[ExportTraceServiceRequest]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        valid = self.path == "/v1/traces" and self.headers["Content-Type"] == "application/x-protobuf"
        if valid:
            self.received.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(200 if valid else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    received: list[ExportTraceServiceRequest] = []
    handler = type("Collector", (_Collector,), {"received": received})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/", received
    server.shutdown()
    thread.join()
    server.server_close()


@asynccontextmanager
async def second_orders(system: System, **settings: object) -> AsyncIterator[str]:
    """Starts another orders instance on the same backends; returns its name in the system."""
    name = f"orders-{uuid4().hex[:4]}"
    port = find_free(1)[0]
    system.urls[name] = f"http://127.0.0.1:{port}"
    system.start("orders", alias=name, instance=7, orders_port=port, **settings)
    try:
        await system.ready(name)
        yield name
    finally:
        if name in system.children:
            await system.stop(name)


def trace_file(system: System) -> Path:
    return system.directory / "traces" / "orders-7.jsonl"


async def test_spans_are_sent_by_otlp_to_a_configured_endpoint(
    traced: System, collector: tuple[str, list[ExportTraceServiceRequest]]
) -> None:
    endpoint, received = collector
    caller = Caller()
    async with second_orders(traced, otlp_endpoint=endpoint) as name:
        await place(traced, caller, service=name)
    later_spans = await spans_of(traced, caller.trace, "write order", "push order_created")
    assert not trace_file(traced).exists()
    found = {}
    for request in received:
        for resource in request.resource_spans:
            attributes = {one.key: one.value.string_value for one in resource.resource.attributes}
            assert attributes["service.name"] == "ticketrail-orders"
            assert attributes["service.version"] == VERSION
            assert attributes["service.instance.id"] == "orders-7"
            for scope in resource.scope_spans:
                found.update({span.name: span for span in scope.spans if span.trace_id.hex() == caller.trace})
    assert found.keys() == {name for name, service in PLACED.items() if service == "orders"}
    root, record, send = found["POST /api/orders"], found["record"], found[SEND]
    assert root.parent_span_id.hex() == caller.span
    assert {found[name].parent_span_id for name in ("claim", "record", "reveal")} == {root.span_id}
    assert send.parent_span_id == record.span_id
    assert later_spans["write order"].parent_id == later_spans["push order_created"].parent_id == send.span_id.hex()
    numbers = {one.key: one.value.int_value for one in root.attributes}
    assert numbers["http.response.status_code"] == 201


async def test_disabled_tracing_writes_nothing_and_errors_still_carry_a_trace_id(traced: System) -> None:
    caller = Caller()
    async with second_orders(traced, trace_sample=0) as name:
        id_ = await place(traced, caller, service=name)
        async with traced.client(service=name) as client:
            unknown = await client.get(f"/api/orders/{uuid4()}", headers=caller.headers)
            own = await client.get(f"/api/orders/{uuid4()}")
        async with http_client(base_url=traced.urls[name]) as stranger:
            refused = await stranger.get("/api/orders", headers=caller.headers)
    assert (unknown.status_code, refused.status_code) == (404, 401)
    assert unknown.json()["error"]["trace_id"] == caller.trace
    # A stranger does not choose the trace.
    assert refused.json()["error"]["trace_id"] != caller.trace
    assert len(own.json()["error"]["trace_id"]) == len(refused.json()["error"]["trace_id"]) == 32
    assert not trace_file(traced).exists()
    await stored(traced, id_)
    async with traced.database() as connection:
        kept = await connection.fetchval("select traceparent from changes where entity_id = $1", id_)
    assert trace_id_of(kept) == caller.trace, "the change lost its trace id"
    assert kept is not None and kept[36:52] != caller.span
