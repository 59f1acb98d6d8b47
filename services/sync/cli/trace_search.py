"""Finds the traces of an order. Changes and dead letters in PostgreSQL have the trace ids; trace files or Jaeger have
the spans. If one of the two sources is unavailable, the search returns the data of the other one."""

import asyncio
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from msgspec import Struct

from shared.errors import described
from shared.observability.trace_files import SpanRow, read_spans
from shared.observability.tracing import trace_id_of
from shared.postgres.pool import UNAVAILABLE, Postgres
from shared.settings import Settings
from shared.version import USER_AGENT

_TIMEOUT_SECONDS = 5.0

# Selects per restaurant, so that the index on (restaurant, entity, entity id, version) is used.
_CHANGES = """
select c.change_id::text, c.version, c.type, c.source, c.accepted_at, c.written_at, c.traceparent
from restaurants r
join changes c on c.restaurant_id = r.id and c.entity = 'order' and c.entity_id = $1
order by c.version, c.change_id
"""


_DEAD_LETTERS = """
select d.id::text, d.change_id::text, d.version, d.type, d.queue, d.reason, d.error, d.status,
    d.last_failed_at, d.trace_id
from restaurants r
join dead_letters d on d.restaurant_id = r.id and d.entity = 'order' and d.entity_id = $1
order by d.first_failed_at, d.id
"""


class TracedChange(Struct):
    change_id: str
    version: int
    type: str
    source: str
    accepted_at: datetime
    written_at: datetime
    traceparent: str | None

    @property
    def trace_id(self) -> str | None:
        return trace_id_of(self.traceparent)


class DeadChange(Struct):
    """A dead letter of the order."""

    id: str
    change_id: str | None
    version: int | None
    type: str | None
    queue: str
    reason: str
    error: str
    status: str
    last_failed_at: datetime
    trace_id: str | None


class FoundTraces(Struct):
    changes: list[TracedChange]
    """The changes in PostgreSQL, by version."""
    spans: list[SpanRow]
    missing: list[str]
    """One sentence for each source that could not be read."""
    dead_letters: list[DeadChange] = []
    """The dead letters of the order, oldest failure first."""


class SearchFailed(Exception):
    """The query API does not answer with traces."""


async def find_traces(settings: Settings, order_id: str) -> FoundTraces:
    missing: list[str] = []
    changes: list[TracedChange] = []
    dead_letters: list[DeadChange] = []
    postgres = Postgres(settings.database_writer_url, settings, size=1)
    try:
        async with postgres.connection() as connection:
            changes = [TracedChange(**dict(row)) for row in await connection.fetch(_CHANGES, order_id)]
            dead_letters = [DeadChange(**dict(row)) for row in await connection.fetch(_DEAD_LETTERS, order_id)]
    except UNAVAILABLE as error:
        missing.append(
            f"PostgreSQL is unavailable ({str(error) or type(error).__name__}): changes and dead letters are not shown"
        )
    finally:
        await postgres.close()
    traced = [*(change.trace_id for change in changes), *(dead_letter.trace_id for dead_letter in dead_letters)]
    ids = list(dict.fromkeys(filter(None, traced)))
    if settings.trace_query_url:
        try:
            spans = await asyncio.to_thread(_from_jaeger, settings.trace_query_url.rstrip("/"), ids, order_id)
        except (OSError, SearchFailed) as error:
            missing.append(f"{settings.trace_query_url} gave no traces: {described(error)}")
            spans = []
    else:
        spans = await asyncio.to_thread(_from_files, settings, ids, order_id)
        if not spans and not settings.traces_path.exists():
            missing.append(f"the folder {settings.traces_path} of the trace files does not exist")
    return FoundTraces(changes, spans, missing, dead_letters)


def _from_files(settings: Settings, ids: Sequence[str], order_id: str) -> list[SpanRow]:
    # Search by order id first: the spans of its requests lead to changes that PostgreSQL does not have yet.
    named = read_spans(settings.traces_path, [order_id.encode()])
    own = (span.trace_id for span in named if span.attributes.get("ticketrail.order_id") == order_id)
    trace_ids = list(dict.fromkeys([*ids, *own]))
    return list(read_spans(settings.traces_path, [id_.encode() for id_ in trace_ids])) if trace_ids else []


# -- Jaeger ------------------------------------------------------------------------------------------------------


def _from_jaeger(url: str, ids: Sequence[str], order_id: str) -> list[SpanRow]:
    tags = urllib.parse.quote(json.dumps({"ticketrail.order_id": order_id}))
    found = _ask(f"{url}/api/traces?service=ticketrail-orders&limit=100&lookback=7d&tags={tags}")
    spans = {(span.trace_id, span.span_id): span for span in _rows(found)}
    for id_ in ids:
        if not any(trace == id_ for trace, _ in spans):
            spans.update({(span.trace_id, span.span_id): span for span in _rows(_ask(f"{url}/api/traces/{id_}"))})
    linked = {trace for span in spans.values() for trace, _ in span.links} - {trace for trace, _ in spans}
    for id_ in sorted(linked):
        spans.update({(span.trace_id, span.span_id): span for span in _rows(_ask(f"{url}/api/traces/{id_}"))})
    return list(spans.values())


def _ask(url: str) -> list[dict[str, Any]]:
    try:
        request = urllib.request.Request(url, headers={"User-Agent": USER_AGENT})  # noqa: S310
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as reply:  # noqa: S310
            answer = json.loads(reply.read())
    except urllib.error.HTTPError as error:
        if error.code == 404:  # the trace was not sampled, or it is older than the retention
            return []
        raise
    except ValueError as error:
        raise SearchFailed(f"the answer is not JSON: {error}") from error
    data = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(data, list):
        raise SearchFailed("the answer is not one of Jaeger's query API")
    return data


def _rows(traces: Iterable[dict[str, Any]]) -> Iterable[SpanRow]:
    for trace in traces:
        services = {name: process.get("serviceName", "") for name, process in trace.get("processes", {}).items()}
        for span in trace.get("spans", ()):
            tags = {tag["key"]: tag["value"] for tag in span.get("tags", ())}
            references = span.get("references", ())
            start = span["startTime"] * 1_000  # microseconds
            failed = tags.get("error") or tags.get("otel.status_code") == "ERROR"
            yield SpanRow(
                trace_id=span["traceID"].zfill(32),
                span_id=span["spanID"].zfill(16),
                parent_id=next(
                    (
                        reference["spanID"].zfill(16)
                        for reference in references
                        if reference["refType"] == "CHILD_OF" and reference["traceID"] == span["traceID"]
                    ),
                    None,
                ),
                name=span["operationName"],
                kind=str(tags.get("span.kind", "internal")),
                service=services.get(span.get("processID", ""), ""),
                start_ns=start,
                end_ns=start + span["duration"] * 1_000,
                attributes=tags,
                links=[
                    (reference["traceID"].zfill(32), reference["spanID"].zfill(16))
                    for reference in references
                    if reference["refType"] == "FOLLOWS_FROM"
                ],
                error=str(tags.get("otel.status_description") or tags.get("error.type") or "error") if failed else None,
            )
