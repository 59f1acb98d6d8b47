"""Records a change: makes it durable, in the broker or in the journal.

Group commit: changes of a lane that wait at the same moment share one message. Only a few publishes run at the same
time, and they begin at least a few milliseconds apart. A change whose lane is idle is published at once. If a publish
is in doubt, the same events go to the journal, and their changes are accepted. The order does not matter, so the
journal drains while new changes are published.
"""

import asyncio
import time
from enum import StrEnum
from typing import Any

import structlog
from msgspec import Struct
from opentelemetry.trace import SpanKind

from shared.entities.contract import MAX_BATCH_CHANGES, Lane, encode_batch
from shared.errors import described
from shared.messaging.publisher import InDoubt, NotSent, Publisher
from shared.messaging.topology import CHANGES
from shared.observability import tracing
from shared.observability.metrics import RailMetrics
from shared.rail.journal import Journal, JournalBroken, JournalInDoubt

log = structlog.get_logger(__name__)

# The maximum size of a message with several changes. It is far below the 16 MiB that RabbitMQ 4 accepts by default. A
# larger change gets a message of its own.
MAX_MESSAGE_BYTES = 1 << 20


class Durability(StrEnum):
    BROKER = "broker"
    JOURNAL = "journal"


class Unrecorded(Exception):
    """The broker did not confirm the change, and the journal did not store it. `sent`: the change was sent, so the
    broker may have it."""

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


class _Waiting(Struct):
    event: bytes
    done: "asyncio.Future[Durability]"
    traceparent: str | None
    trace: tracing.Trace | None
    began: int
    """The time when the change began to wait for its message, in nanoseconds since 1970."""


class Recorder:
    def __init__(
        self,
        publisher: Publisher,
        journal: Journal | None,
        *,
        max_publishes: int,
        publish_interval_ms: float = 0.0,
        batch_max_changes: int = MAX_BATCH_CHANGES,
        metrics: RailMetrics | None = None,
    ) -> None:
        self._metrics = metrics
        self._publisher = publisher
        self._journal = journal
        self._max_publishes = max_publishes
        self._interval_seconds = publish_interval_ms / 1000
        self._next_start = dict.fromkeys(Lane, 0.0)
        self._timers: dict[Lane, asyncio.TimerHandle] = {}
        self._draining = False
        self._batch_changes = min(batch_max_changes, MAX_BATCH_CHANGES)
        self._waiting: dict[Lane, list[_Waiting]] = {lane: [] for lane in Lane}
        self._publishes: dict[Lane, set[asyncio.Task[None]]] = {lane: set() for lane in Lane}

    async def record(self, lane: Lane, event: bytes, traceparent: str | None = None) -> Durability:
        """Records a change, which is durable when this returns. Raises Unrecorded. `traceparent`: the traceparent of
        the event. If it belongs to the current trace, spans are noted in that trace."""
        trace = tracing.current()
        if trace is not None and (traceparent is None or traceparent[3:35] != trace.trace_id):
            trace = None
        waiting = _Waiting(event, asyncio.get_running_loop().create_future(), traceparent, trace, time.time_ns())
        self._waiting[lane].append(waiting)
        self._start_publishes(lane)
        return await waiting.done

    async def drain(self) -> None:
        """Waits until no publish is under way. Call it at shutdown, after the last request."""
        self._draining = True
        for lane in Lane:
            self._start_publishes(lane)
        while any(self._waiting.values()) or any(self._publishes.values()):
            await asyncio.gather(*(task for tasks in self._publishes.values() for task in tasks))

    def _start_publishes(self, lane: Lane) -> None:
        while self._waiting[lane] and len(self._publishes[lane]) < self._max_publishes:
            if self._interval_seconds and not self._draining:
                loop = asyncio.get_running_loop()
                now = loop.time()
                if now < self._next_start[lane]:
                    if lane not in self._timers:
                        self._timers[lane] = loop.call_at(self._next_start[lane], self._on_timer, lane)
                    return
                self._next_start[lane] = now + self._interval_seconds
            task = asyncio.create_task(self._send(lane, self._take(lane)), name=f"record-{lane}")
            self._publishes[lane].add(task)
            task.add_done_callback(lambda task: self._sent(lane, task))

    def _on_timer(self, lane: Lane) -> None:
        del self._timers[lane]
        self._start_publishes(lane)

    def _take(self, lane: Lane) -> list[_Waiting]:
        waiting, size, count = self._waiting[lane], 0, 0
        for change in waiting[: self._batch_changes]:
            size += len(change.event)
            if count and size > MAX_MESSAGE_BYTES:
                break
            count += 1
        self._waiting[lane] = waiting[count:]
        return waiting[:count]

    def _sent(self, lane: Lane, task: "asyncio.Task[None]") -> None:
        self._publishes[lane].discard(task)
        self._start_publishes(lane)

    async def _send(self, lane: Lane, changes: list[_Waiting]) -> None:
        try:
            durability = await self._make_durable(lane, changes)
            if self._metrics is not None:
                self._metrics.per_message.observe(len(changes))
                self._metrics.durable.inc(durability.value, len(changes))
        except BaseException as error:  # noqa: BLE001  (every waiting caller gets the error)
            failure = error if isinstance(error, Unrecorded) else Unrecorded(described(error), sent=True)
            for change in changes:
                if not change.done.done():
                    change.done.set_exception(failure)
            return
        for change in changes:
            if not change.done.done():
                change.done.set_result(durability)

    async def _make_durable(self, lane: Lane, changes: list[_Waiting]) -> Durability:
        reason: Exception
        began = time.time_ns()
        events = [change.event for change in changes]
        try:
            await self._publisher.publish(lane.value, encode_batch(events))
        except (NotSent, InDoubt) as error:
            reason, sent = error, isinstance(error, InDoubt)
        else:
            _note(changes, send_span_name(lane), began, send_attributes(lane, len(changes)))
            return Durability.BROKER
        if sent:
            log.warning("record_in_doubt", lane=lane, changes=len(events), error=str(reason))
            _note(
                changes,
                send_span_name(lane),
                began,
                send_attributes(lane, len(changes)),
                error=described(reason),
            )
        began = time.time_ns()
        if self._journal is None:
            raise Unrecorded(str(reason), sent=sent) from reason
        try:
            await self._journal.append([(lane, event) for event in events])
        except JournalBroken as error:
            log.error("journal_failed", changes=len(events), error=str(error))
            _note(changes, "journal", began, {}, error=described(error))
            raise Unrecorded(str(error), sent=sent or isinstance(error, JournalInDoubt)) from error
        _note(changes, "journal", began, {"ticketrail.message.changes": len(changes)})
        return Durability.JOURNAL


def send_span_name(lane: Lane) -> str:
    """Returns the name of a span that publishes to a lane."""
    return f"send {CHANGES}:{lane.value}"


def send_attributes(lane: Lane, changes: int) -> dict[str, Any]:
    """Returns the attributes of a span that publishes one message with `changes` changes
    (OpenTelemetry's conventions)."""
    return {
        "messaging.system": "rabbitmq",
        "messaging.operation.type": "send",
        "messaging.operation.name": "send",
        "messaging.destination.name": f"{CHANGES}:{lane.value}",
        "messaging.rabbitmq.destination.routing_key": lane.value,
        "ticketrail.message.changes": changes,
    }


def _note(
    changes: list[_Waiting], name: str, began: int, attributes: dict[str, Any], *, error: str | None = None
) -> None:
    """Notes two spans in the trace of each change. `record` begins when the change begins to wait. Inside it is the
    publish or the journal write. The change carries the id of the span that made it durable."""
    ended = time.time_ns()
    for change in changes:
        trace = change.trace
        if trace is None or not trace.kept:
            continue
        record = tracing.new_span_id()
        own = None if error or change.traceparent is None else change.traceparent[36:52]
        trace.note("record", change.began, ended, error=error, span_id=record)
        trace.note(
            name,
            began,
            ended,
            kind=SpanKind.PRODUCER,
            attributes=attributes,
            error=error,
            span_id=own,
            parent=record,
        )
