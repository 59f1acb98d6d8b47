"""Follows the log and feeds the hub.

Guarantee: every change in the log reaches the hub once, in the order of the log, those of the last
`replay_window_seconds` again after a start. An entry that cannot be read is skipped with an error in the log (the
writer dead-letters it) and still counts for the cursor; it stops nothing. While the broker is away the hub continues to
serve what it holds. After a loss of the log the follower starts a new hub. At shutdown it stops at once: it holds
nothing that the log does not have.
"""

import asyncio
import time
from contextlib import aclosing
from datetime import timedelta
from typing import Any

import structlog
from opentelemetry.trace import SpanKind

from services.notifier.cursor import Position
from services.notifier.events import PushEvent, push_event
from services.notifier.hub import Hub
from shared.entities.contract import BrokenContract, now, split_batch
from shared.lifecycle import BackgroundLoop
from shared.messaging.log import LogBatch, LogEntry, LogReader
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

# Changes that are handed to the hub in one step. Between two steps the clients are written to: more would fill their
# buffers with what they had no chance to read.
_STEP = 256


class LogFollower:
    def __init__(self, settings: Settings, hub: Hub, tracer: Tracer, metrics: PushMetrics) -> None:
        self._metrics = metrics
        self._settings = settings
        self._hub = hub
        self._begun = False
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
        """The window is read back, and the log is being read now."""
        return self._reader.caught_up and self._hub.window.epoch is not None

    @property
    def serving(self) -> bool:
        """The window was read back once; since then the broker may have gone away."""
        return self._begun and self._hub.window.epoch is not None

    def start(self) -> None:
        self.loop.start()
        self._keep_alive_loop.start()

    async def stop(self) -> None:
        await self.loop.stop()
        await self._keep_alive_loop.stop()

    @property
    def heartbeat_age(self) -> float:
        """Seconds since the last heartbeat was sent; NaN when none was seen."""
        heartbeat_at = self._reader.heartbeat_at
        return float("nan") if heartbeat_at is None else (now() - heartbeat_at).total_seconds()

    def readiness(self) -> tuple[bool, dict[str, Any]]:
        """Not ready while the window is being read back or the broker is away. Heartbeats that stop coming say that the
        sync worker is down: push works without it, so that is only reported."""
        heartbeat_at = self._reader.heartbeat_at
        age = None if heartbeat_at is None else (now() - heartbeat_at).total_seconds()
        stale = age is None or age > max(2.0, self._settings.heartbeat_interval_seconds * 3)
        return self.caught_up and self._begun, {
            "broker": self._reader.connected,
            "caught_up": self.caught_up,
            "epoch": self._hub.window.epoch,
            "heartbeats": "stale" if stale else "fresh",
            "heartbeat_age_seconds": None if age is None else round(age, 3),
            "window": len(self._hub.window),
            "subscribers": len(self._hub),
        }

    async def _keep_alive(self) -> None:
        while True:
            await asyncio.sleep(self._settings.push_keepalive_seconds)
            self._hub.window.forget(time.monotonic())
            self._hub.beat()

    async def _follow(self) -> None:
        since = now() - timedelta(seconds=self._settings.replay_window_seconds)
        async with aclosing(self._reader.read(since)) as batches:
            first = True
            async for batch in batches:
                if first or batch.restarted or batch.epoch != self._hub.window.epoch:
                    self._hub.begin(batch.epoch, batch.first_offset)
                    first = False
                await self._take(batch)
                if batch.caught_up and not self._begun:
                    log.info("caught_up", epoch=batch.epoch, window=len(self._hub.window))
                    self._begun = True
                self.loop.turned()

    async def _take(self, batch: LogBatch) -> None:
        began = time.time_ns()
        events: list[PushEvent] = []
        upto = Position(batch.first_offset, 0)
        changes = 0
        for entry in batch.entries:
            found, upto = _events_in(entry)
            events += found
            changes += upto.place + 1
            if changes >= _STEP:
                self._hub.publish(events, upto, time.monotonic())
                self._trace(events, began)
                events, changes = [], 0
                await asyncio.sleep(0)
        # The signals at the end of a batch move the cursor too.
        self._hub.publish(events, max(upto, Position(batch.last_offset, 0)), time.monotonic())
        self._trace(events, began)

    def _trace(self, events: list[PushEvent], began: int) -> None:
        """Once in the life of an event here: what is read back at a start was pushed before."""
        if not self._begun:
            return
        ended = time.time_ns()
        self._metrics.events.inc(len(events))
        for event in events:
            self._metrics.lag.observe(max(0.0, ended / 1e9 - event.accepted_at))
            if self._tracer.wanted(event.traceparent):
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


def _events_in(entry: LogEntry) -> tuple[list[PushEvent], Position]:
    """The push events of one message, and the position of its last change."""
    events = []
    index = 0
    try:
        for index, encoded in enumerate(split_batch(entry.body)):
            try:
                event = push_event(encoded, Position(entry.offset, index))
            except BrokenContract as error:
                log.error("not_pushed", offset=entry.offset, index=index, reason=error.reason, error=str(error))
            else:
                if event is not None:
                    events.append(event)
    except BrokenContract as error:
        log.error("not_pushed", offset=entry.offset, reason=error.reason, error=str(error))
    return events, Position(entry.offset, index)
