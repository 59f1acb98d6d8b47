"""Traces of the PostgreSQL writer. A batch has a span that links to its traced changes, and each of these has a span in
its own trace. A failed change is always traced."""

from collections.abc import Sequence

from opentelemetry.trace import SpanKind

from services.sync.failures.retry_ladder import FailedChange
from services.sync.writer.batches import ReceivedChange, WriteBatch
from shared.entities.contract import Change
from shared.messaging import topology
from shared.observability.tracing import Tracer

# Several statements of one transaction.
_POSTGRES = {"db.system.name": "postgresql", "db.operation.name": "BATCH"}


def _names(change: Change) -> dict[str, str]:
    """Returns the span attributes by which traces are searched, also for a change that never reaches PostgreSQL."""
    return {"ticketrail.change_id": change.id, f"ticketrail.{change.entity}_id": change.entity_id}


def trace_batch(
    tracer: Tracer,
    batch: WriteBatch,
    messages: int,
    written: Sequence[ReceivedChange],
    failed: Sequence[FailedChange],
    began: int,
    ended: int,
) -> None:
    """Adds the spans of a batch. `messages`: the number of its messages. `began`, `ended`: when they were taken and
    when they were committed, in nanoseconds since 1970."""
    if not tracer.on:
        return
    traced = [
        one.written.change
        for one in written
        if tracer.wanted(
            one.written.change.traceparent, slow_ns=ended - int(one.written.change.time.timestamp() * 1_000_000_000)
        )
    ]
    broken = [one for one in failed if one.change is not None and one.change.traceparent]
    if not traced and not broken:
        return
    queue = topology.lane_queue(batch.lane)
    links = [change.traceparent for change in traced] + [one.change.traceparent for one in broken if one.change]
    own = tracer.add(
        None,
        f"process {queue}",
        began,
        ended,
        kind=SpanKind.CONSUMER,
        attributes={
            "messaging.system": "rabbitmq",
            "messaging.operation.type": "process",
            "messaging.operation.name": "process",
            "messaging.destination.name": queue,
            "messaging.batch.message_count": messages,
            "ticketrail.batch.changes": len(batch.changes),
            "ticketrail.batch.failed": len(failed),
        },
        links=links,
        error=f"changes_failed: {len(failed)} of {len(written) + len(failed)}" if failed else None,
    )
    for change in traced:
        tracer.add(
            change.traceparent,
            f"write {change.entity}",
            began,
            ended,
            kind=SpanKind.CLIENT,
            attributes={
                **_POSTGRES,
                **_names(change),
                "messaging.destination.name": queue,
                "ticketrail.batch.changes": len(batch.changes),
            },
            links=(own,),
        )
    for one in broken:
        assert one.change is not None
        tracer.add(
            one.change.traceparent,
            f"write {one.change.entity}",
            began,
            ended,
            kind=SpanKind.CLIENT,
            attributes={
                **_POSTGRES,
                **_names(one.change),
                "messaging.destination.name": queue,
                "ticketrail.attempt": one.attempt,
            },
            error=f"{one.failure.reason}: {one.failure.error}",
            links=(own,),
        )
