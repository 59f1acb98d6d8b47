"""Records a change: makes it durable, in the broker or in the journal.

Group commit: changes of a lane that wait at the same moment share one message. Only a few publishes run at the same
time, and they begin at least a few milliseconds apart. A change whose lane is idle is published at once. If a publish
is in doubt, the same events go to the journal, and their changes are accepted. The order does not matter, so the
journal drains while new changes are published.

Slow broker: messages are small, so that a change never waits long behind the bytes of another one. A change that is
larger than a message, or that has waited too long for its publish, leaves the lane (`_leave_lane`): it goes to the
journal, which drains over a connection of its own. A process without a journal publishes it over a second connection.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
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

MAX_MESSAGE_BYTES = 128 << 10
"""The maximum size of a message with several changes. A link of 4 Mbit/s carries it in 0.3 seconds. A larger change
gets a message of its own."""


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
    since: float
    """The same time on the clock of the event loop, in seconds."""
    only_broker: bool = False
    """True for a change that is larger than a message, after the journal has refused it."""


_MakeDurable = Callable[[Lane, list[_Waiting]], Awaitable[Durability | None]]


class Recorder:
    def __init__(
        self,
        publisher: Publisher,
        journal: Journal | None,
        *,
        max_publishes: int,
        max_wait_seconds: float = 1.0,
        publish_interval_ms: float = 0.0,
        batch_max_changes: int = MAX_BATCH_CHANGES,
        second: "Recorder | None" = None,
        connect_seconds: float = 0.0,
        metrics: RailMetrics | None = None,
    ) -> None:
        """`max_wait_seconds`: a change that has waited this long for its publish leaves the lane. `second`: records the
        changes that leave a lane, if there is no journal. `connect_seconds`: if set, the first change starts the
        publisher, and waits this long for the connection."""
        self._metrics = metrics
        self._publisher = publisher
        self._journal = journal
        self._second = second
        self._connect_seconds = connect_seconds
        self._max_wait_seconds = max_wait_seconds
        self._max_publishes = max_publishes
        self._interval_seconds = publish_interval_ms / 1000
        self._next_start = dict.fromkeys(Lane, 0.0)
        self._timers: dict[Lane, asyncio.TimerHandle] = {}
        # One timer per lane and not per change: it runs for the oldest change that waits.
        self._deadlines: dict[Lane, asyncio.TimerHandle] = {}
        self._leaving: set[asyncio.Task[None]] = set()
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
        loop = asyncio.get_running_loop()
        waiting = _Waiting(event, loop.create_future(), traceparent, trace, time.time_ns(), loop.time())
        if len(event) > MAX_MESSAGE_BYTES and self._has_way_out:
            self._leave_lane(lane, [waiting])
        else:
            self._wait(lane, waiting)
        return await waiting.done

    async def drain(self) -> None:
        """Waits until no publish is under way. Call it at shutdown, after the last request."""
        self._draining = True
        for lane in Lane:
            self._start_publishes(lane)
        while any(self._waiting.values()) or any(self._publishes.values()) or self._leaving:
            await asyncio.gather(*self._leaving, *(task for tasks in self._publishes.values() for task in tasks))
        if self._second is not None:
            await self._second.drain()

    @property
    def _has_way_out(self) -> bool:
        """Whether there is another place for a change than its lane."""
        return self._journal is not None or self._second is not None

    def _wait(self, lane: Lane, *changes: _Waiting) -> None:
        self._waiting[lane].extend(changes)
        self._start_publishes(lane)
        if self._waiting[lane] and self._has_way_out and lane not in self._deadlines:
            self._set_deadline(lane)

    def _set_deadline(self, lane: Lane) -> None:
        at = self._waiting[lane][0].since + self._max_wait_seconds
        self._deadlines[lane] = asyncio.get_running_loop().call_at(at, self._on_deadline, lane)

    def _on_deadline(self, lane: Lane) -> None:
        del self._deadlines[lane]
        now = asyncio.get_running_loop().time()
        late = [change for change in self._waiting[lane] if change.since + self._max_wait_seconds <= now]
        if late:
            self._waiting[lane] = self._waiting[lane][len(late) :]
            self._leave_lane(lane, late)
        if self._waiting[lane]:
            self._set_deadline(lane)

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
            task = asyncio.create_task(self._finish(lane, self._take(lane), self._publish), name=f"record-{lane}")
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

    async def _finish(self, lane: Lane, changes: list[_Waiting], make_durable: _MakeDurable) -> None:
        """Makes the changes durable and tells their callers."""
        try:
            durability = await make_durable(lane, changes)
            if durability is None:
                return
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

    def _leave_lane(self, lane: Lane, changes: list[_Waiting]) -> None:
        """Records changes in another way than by the next publish of their lane. Nothing of them was sent yet."""
        log.info("record_leaves_lane", lane=lane, changes=len(changes), bytes=sum(len(each.event) for each in changes))
        if self._journal is None and self._second is not None:
            self._second.take_over(lane, changes)
            return
        task = asyncio.create_task(self._finish(lane, changes, self._keep), name=f"journal-{lane}")
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    def take_over(self, lane: Lane, changes: list[_Waiting]) -> None:
        """Records changes of another recorder, which are waiting there."""
        self._wait(lane, *changes)

    async def _keep(self, lane: Lane, changes: list[_Waiting]) -> Durability | None:
        """Writes changes that were not sent into the journal. Raises Unrecorded. Returns None if the changes wait for
        the broker again: it may take a large change while the journal is broken or full."""
        try:
            return await self._write_journal(lane, changes, sent=False)
        except Unrecorded as error:
            large = [change for change in changes if len(change.event) > MAX_MESSAGE_BYTES and not change.only_broker]
            if error.sent or len(large) < len(changes):
                raise
        for change in large:
            change.only_broker = True
            change.since = asyncio.get_running_loop().time()
        self._wait(lane, *large)
        return None

    async def _publish(self, lane: Lane, changes: list[_Waiting]) -> Durability:
        began = time.time_ns()
        try:
            if self._connect_seconds and not self._publisher.connected:
                await self._publisher.start(wait=self._connect_seconds)
            await self._publisher.publish(lane.value, encode_batch([change.event for change in changes]))
        except (NotSent, InDoubt) as error:
            reason, sent = error, isinstance(error, InDoubt)
        else:
            _note(changes, send_span_name(lane), began, send_attributes(lane, len(changes)))
            return Durability.BROKER
        if sent:
            log.warning("record_in_doubt", lane=lane, changes=len(changes), error=str(reason))
            _note(
                changes,
                send_span_name(lane),
                began,
                send_attributes(lane, len(changes)),
                error=described(reason),
            )
        if self._journal is None:
            raise Unrecorded(str(reason), sent=sent) from reason
        return await self._write_journal(lane, changes, sent=sent)

    async def _write_journal(self, lane: Lane, changes: list[_Waiting], *, sent: bool) -> Durability:
        """Raises Unrecorded. `sent`: the broker may have the changes."""
        assert self._journal is not None
        began = time.time_ns()
        try:
            await self._journal.append([(lane, change.event) for change in changes])
        except JournalBroken as error:
            log.error("journal_failed", changes=len(changes), error=str(error))
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
