"""Follows the change log and feeds the hub.

Guarantee: every change in the log reaches the hub once, in the order of the log. After a start the changes of the last
`replay_window_seconds` are read again. An unreadable entry is logged and skipped (the PostgreSQL writer dead-letters
it), but the cursor moves past it. While the broker is unavailable, the hub serves its window. If the log has lost its
end, the follower goes back to a message of the window that the log still has. If it has none, such as a log that was
created again, the window begins again and every client gets a resync. The follower may be stopped at any time, because
it holds nothing that the log does not have."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import aclosing
from datetime import timedelta
from typing import Any

import structlog
from opentelemetry.trace import SpanKind

from services.notifier.cursor import Cursor, cursor_at
from services.notifier.events import PushEvent, push_event
from services.notifier.hub import Hub
from shared.entities.contract import BrokenContract, now, split_batch
from shared.lifecycle import BackgroundLoop
from shared.messaging.log import LogBatch, LogEntry, LogReader, Start
from shared.messaging.position import LogPosition
from shared.messaging.topology import LOG
from shared.observability.metrics import PushMetrics
from shared.observability.tracing import Tracer
from shared.settings import Settings

log = structlog.get_logger(__name__)

_FROM_LOG = {
    "messaging.system": "rabbitmq",
    "messaging.operation.type": "process",
    "messaging.operation.name": "push",
    "messaging.destination.name": LOG,
}

# The maximum number of changes that the hub gets in one step. Streams are written between steps, so a larger step would
# fill the buffers of clients before they can read.
_MAX_STEP_CHANGES = 256


class LogFollower:
    def __init__(self, settings: Settings, hub: Hub, tracer: Tracer, metrics: PushMetrics) -> None:
        self._metrics = metrics
        self._settings = settings
        self._hub = hub
        self._filled = False
        self._tracer = tracer
        self._reader = LogReader(
            settings.rabbitmq_url,
            name=f"notifier-{settings.instance}",
            idle_seconds=settings.heartbeat_interval_seconds * 3,
        )
        self.loop = BackgroundLoop("log-follower", self._follow)
        self._keep_alive_loop = BackgroundLoop("push-keep-alive", self._keep_alive)

    @property
    def caught_up(self) -> bool:
        """True if the window is filled and the log is read to its end."""
        return self._reader.caught_up and self._filled

    @property
    def serving(self) -> bool:
        """True if the window has been filled once. The broker may have become unavailable since then."""
        return self._filled

    def start(self) -> None:
        self.loop.start()
        self._keep_alive_loop.start()

    async def stop(self) -> None:
        await self.loop.stop()
        await self._keep_alive_loop.stop()

    @property
    def heartbeat_age(self) -> float:
        """Seconds since the last heartbeat was sent, or NaN before the first one."""
        heartbeat_at = self._reader.heartbeat_at
        return float("nan") if heartbeat_at is None else (now() - heartbeat_at).total_seconds()

    def readiness(self) -> tuple[bool, dict[str, Any]]:
        """Returns (ready, details for the health endpoint). The notifier is not ready while the window is being filled
        or the broker is unavailable. Stale heartbeats mean that the sync worker is down; push works without it, so they
        are only reported."""
        heartbeat_at = self._reader.heartbeat_at
        age = None if heartbeat_at is None else (now() - heartbeat_at).total_seconds()
        stale = age is None or age > max(2.0, self._settings.heartbeat_interval_seconds * 3)
        return self.caught_up, {
            "broker": self._reader.connected,
            "caught_up": self.caught_up,
            "heartbeats": "stale" if stale else "fresh",
            "heartbeat_age_seconds": None if age is None else round(age, 3),
            "window": len(self._hub.window),
            "subscribers": len(self._hub),
        }

    async def _keep_alive(self) -> None:
        while True:
            await asyncio.sleep(self._settings.push_keepalive_seconds)
            self._hub.window.forget(time.monotonic())
            self._hub.keep_alive()

    async def _follow(self) -> None:
        async with aclosing(self._reader.read(self._window_start(), fallbacks=self._fallbacks)) as batches:
            first = True
            async for batch in batches:
                restarted = batch.broken is not None and not isinstance(batch.broken.back_to, LogPosition)
                if first or restarted:
                    self._hub.begin(batch.positions[0])
                    first = False
                await self._take(batch)
                if restarted:
                    self._hub.resync("truncated")
                if batch.caught_up and not self._filled:
                    log.info("caught_up", position=batch.last, window=len(self._hub.window))
                    self._filled = True
                self.loop.turned()

    def _window_start(self) -> Start:
        return now() - timedelta(seconds=self._settings.replay_window_seconds)

    async def _fallbacks(self) -> Sequence[Start]:
        return [*self._hub.window.older_positions(), self._window_start()]

    async def _take(self, batch: LogBatch) -> None:
        began = time.time_ns()
        events: list[PushEvent] = []
        upto = cursor_at(batch.positions[0])
        changes = passed = 0
        for entry in batch.entries:
            found, upto = _events_in(entry)
            events += found
            changes += upto.batch_index + 1
            if changes >= _MAX_STEP_CHANGES:
                until = batch.positions.index(entry.position, passed) + 1
                self._hub.publish(events, batch.positions[passed:until], upto, time.monotonic())
                self._trace(events, began)
                events, changes, passed = [], 0, until
                await asyncio.sleep(0)
        # Signals at the end of a batch also move the cursor.
        self._hub.publish(events, batch.positions[passed:], max(upto, cursor_at(batch.last)), time.monotonic())
        self._trace(events, began)

    def _trace(self, events: list[PushEvent], began: int) -> None:
        """Adds spans and metrics for pushed events. Skips the events that fill the window, which were pushed before the
        start."""
        if not self._filled:
            return
        ended = time.time_ns()
        self._metrics.events.inc(len(events))
        for event in events:
            self._metrics.lag.observe(max(0.0, ended / 1e9 - event.accepted_at))
            if self._tracer.will_export(event.traceparent):
                self._tracer.add(
                    event.traceparent,
                    f"push {event.name(of_one_order=False)}",
                    began,
                    ended,
                    kind=SpanKind.CONSUMER,
                    attributes={
                        **_FROM_LOG,
                        "ticketrail.change_id": event.change_id,
                        "ticketrail.push.subscribers": self._hub.listeners(event),
                    },
                )


def _events_in(entry: LogEntry) -> tuple[list[PushEvent], Cursor]:
    """Returns the push events of one message, and the cursor of its last change."""
    events = []
    index = 0
    try:
        for index, encoded in enumerate(split_batch(entry.body)):
            try:
                event = push_event(encoded, cursor_at(entry.position, index))
            except BrokenContract as error:
                log.error("not_pushed", offset=entry.offset, index=index, reason=error.reason, error=str(error))
            else:
                if event is not None:
                    events.append(event)
    except BrokenContract as error:
        log.error("not_pushed", offset=entry.offset, reason=error.reason, error=str(error))
    return events, cursor_at(entry.position, index)
