"""Adds the spans of the PostgreSQL writer. A batch has one span, which links to its traced changes. Each traced change
has a span in its own trace. Failed changes are always traced."""

from collections.abc import Sequence

from opentelemetry.trace import SpanKind

from services.sync.failures.retry_ladder import FailedChange
from services.sync.writer.batches import ReceivedChange, WriteBatch
from shared.entities.contract import Change
from shared.messaging import topology
from shared.observability.tracing import Tracer

# BATCH stands for the several statements of one transaction.
_POSTGRES = {"db.system.name": "postgresql", "db.operation.name": "BATCH"}


def _search_attributes(change: Change) -> dict[str, str]:
    """Returns the span attributes with which a trace can be found, even if the change never reaches PostgreSQL."""
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
    """Adds the spans of a batch. `messages`: the number of its messages. `began` and `ended`: when the messages were
    taken and when the batch was committed, in nanoseconds since 1970."""
    if not tracer.on:
        return
    traced = [
        received.decoded.change
        for received in written
        if tracer.will_export(
            received.decoded.change.traceparent,
            slow_ns=ended - int(received.decoded.change.time.timestamp() * 1_000_000_000),
        )
    ]
    broken = [
        failed_change
        for failed_change in failed
        if failed_change.change is not None and failed_change.change.traceparent
    ]
    if not traced and not broken:
        return
    queue = topology.lane_queue(batch.lane)
    links = [change.traceparent for change in traced] + [
        failed_change.change.traceparent for failed_change in broken if failed_change.change
    ]
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
                **_search_attributes(change),
                "messaging.destination.name": queue,
                "ticketrail.batch.changes": len(batch.changes),
            },
            links=(own,),
        )
    for failed_change in broken:
        assert failed_change.change is not None
        tracer.add(
            failed_change.change.traceparent,
            f"write {failed_change.change.entity}",
            began,
            ended,
            kind=SpanKind.CLIENT,
            attributes={
                **_POSTGRES,
                **_search_attributes(failed_change.change),
                "messaging.destination.name": queue,
                "ticketrail.attempt": failed_change.attempt,
            },
            error=f"{failed_change.failure.reason}: {failed_change.failure.error}",
            links=(own,),
        )
