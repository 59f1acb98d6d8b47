"""Heartbeats: small messages that go through every lane and the change log, to distinguish an idle path from a broken
one.

`HeartbeatSender` sends a heartbeat through every lane every few seconds; each one reaches the log too.
`HeartbeatMonitor` records which heartbeats came out. Two events count. A heartbeat that arrives at a consumer proves
the binding of its lane. A heartbeat that a sink stores (PostgreSQL commits it, or the mirror writer applies it) shows
how far that sink is.

Backend unavailable: nothing here waits for PostgreSQL. Without it, the sender uses the last known epoch of the log, and
sends nothing before it knows one. A heartbeat that RabbitMQ does not confirm is dropped.

Shutdown: at any time; nothing has to be finished.
"""

import asyncio
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any
from uuid import uuid4

import asyncpg
import structlog
from msgspec import Struct

from services.sync.failures.classification import describe
from shared.entities.contract import Lane, now
from shared.entities.signal import HEARTBEAT, Signal, encode_signal
from shared.lifecycle import BackgroundLoop
from shared.messaging import topology
from shared.messaging.declare import TopologyError
from shared.messaging.publisher import InDoubt, NotSent, Publisher
from shared.postgres.migrate import present_epoch
from shared.postgres.pool import Connection, Postgres
from shared.settings import Settings

log = structlog.get_logger(__name__)


def log_path_of(lane: Lane) -> str:
    """Returns the name of the path through a lane's routing key into the log."""
    return f"log/{lane}"


HEARTBEAT_PATHS = (*(lane.value for lane in Lane), *(log_path_of(lane) for lane in Lane))

_MIN_FRESH_SECONDS = 2.0
_LANES_EMPTIED = "select min(sent_at) from heartbeats where lane = any($1) having count(*) = cardinality($1)"


async def lanes_emptied(connection: "asyncpg.Connection[asyncpg.Record] | Connection") -> datetime | None:
    """Returns a moment before which every sent message has left its lane; None while a lane had no heartbeat."""
    found: datetime | None = await connection.fetchval(_LANES_EMPTIED, [lane.value for lane in Lane])
    return found


class HeartbeatPath(Struct):
    """The state of one path: into the queue of a lane, or into the log. A `datetime` is on the sender's clock, a
    `float` on the monotonic clock of this process."""

    unanswered: float | None = None
    """When the oldest missing heartbeat of this path was sent; None if none is missing."""
    arrived_at: datetime | None = None
    """The time in the newest heartbeat that came out."""
    arrived: float = 0.0
    active: float = 0.0
    """When the last message of any kind came out."""
    noted_at: datetime | None = None
    """The time in the newest heartbeat that the sink has stored."""
    noted: float = 0.0
    lag: float = 0.0
    """Seconds between sending and storing that heartbeat."""


class HeartbeatMonitor:
    def __init__(self, settings: Settings) -> None:
        self._fresh_seconds = max(3 * settings.heartbeat_interval_seconds, _MIN_FRESH_SECONDS)
        self._paths = {name: HeartbeatPath() for name in HEARTBEAT_PATHS}
        self._idle: dict[str, Callable[[], bool]] = {}
        self._changed = asyncio.Event()

    # -- called by sender and consumers ------------------------------------------------------------------------

    def watch_lane(self, lane: Lane, idle: Callable[[], bool]) -> None:
        """`idle` returns True while the consumers of the lane are subscribed and hold no messages."""
        self._idle[lane.value] = idle

    def sent(self, lane: Lane) -> None:
        """Records that the broker has confirmed a heartbeat."""
        for name in (lane.value, log_path_of(lane)):
            path = self._paths[name]
            path.unanswered = path.unanswered or time.monotonic()

    def active(self, lane: Lane) -> None:
        """Records that a message of any kind came out of the lane."""
        self._paths[lane.value].active = time.monotonic()

    def arrived(self, lane: Lane, sent_at: datetime) -> None:
        """Records that a consumer of the lane has received a heartbeat."""
        self._arrived(self._paths[lane.value], sent_at)

    def note(self, lane: Lane, sent_at: datetime, noted_at: datetime) -> None:
        """Records that PostgreSQL has committed the heartbeat."""
        self._note(self._paths[lane.value], sent_at, noted_at)

    def note_log_end(self) -> None:
        """Records that the mirror writer has read the log to its end. From now on a missing heartbeat means a missing
        binding."""
        for lane in Lane:
            self._idle[log_path_of(lane)] = lambda: True
            self._paths[log_path_of(lane)].active = time.monotonic()

    def arrived_in_log(self, lane: Lane, sent_at: datetime) -> None:
        """Records that the mirror writer has read a heartbeat. This proves the binding, also while the mirror is
        unavailable."""
        self._arrived(self._paths[log_path_of(lane)], sent_at)

    def note_log(self, lane: Lane, sent_at: datetime, noted_at: datetime) -> None:
        """Records that the mirror writer has applied the log up to the heartbeat."""
        self._note(self._paths[log_path_of(lane)], sent_at, noted_at)

    # -- results ------------------------------------------------------------------------------------------

    def readiness(self) -> tuple[bool, dict[str, Any]]:
        """Returns (ready, details for the health endpoint). Ready: a heartbeat came out of every path within three
        intervals. Ages and lags are in seconds."""
        stale, ages, lags = self.stale(), self.ages(), self.lags()
        return not stale, {"stale": stale, "age_seconds": ages, "lag_seconds": lags}

    def stale(self) -> list[str]:
        """Returns the paths from which no heartbeat came out for three intervals."""
        soonest = time.monotonic() - self._fresh_seconds
        return [name for name, path in self._paths.items() if path.arrived_at is None or path.arrived < soonest]

    def ages(self) -> dict[str, float | None]:
        """Returns the seconds since each sink last stored a heartbeat; None if it never did."""
        at = time.monotonic()
        return {name: None if path.noted_at is None else at - path.noted for name, path in self._paths.items()}

    def lags(self) -> dict[str, float | None]:
        """Returns the seconds from sending to storing the last heartbeat of each path; None if none was stored."""
        return {name: None if path.noted_at is None else path.lag for name, path in self._paths.items()}

    async def prove(self, timeout: float) -> bool:
        """Waits until a heartbeat that was sent after this call has come out of every path. Returns True if every
        binding is proved.

        Returns False if a heartbeat is missing after `timeout` seconds for a reason that may be harmless: a backlog in
        front of it, or PostgreSQL or the broker is unavailable. `readiness` continues to check. Raises TopologyError if
        no such reason is left: the heartbeat was sent, its queue is empty and consumed, and it did not come out.
        """
        began = now()
        for path in self._paths.values():
            path.unanswered = None
        deadline = time.monotonic() + timeout
        while missing := self._missing(began):
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return self._check_missing(missing, timeout)
            self._changed.clear()
            try:
                async with asyncio.timeout(remaining):
                    await self._changed.wait()
            except TimeoutError:
                continue
        return True

    def _missing(self, began: datetime) -> list[str]:
        return [name for name, path in self._paths.items() if path.arrived_at is None or path.arrived_at < began]

    def _check_missing(self, missing: list[str], timeout: float) -> bool:
        quiet = min(timeout / 2, 2.0)
        for name in missing:
            path, at = self._paths[name], time.monotonic()
            unanswered = path.unanswered is not None and at - path.unanswered > quiet
            if unanswered and self._idle.get(name, lambda: False)() and at - path.active > quiet:
                of_the_log, _, lane = name.rpartition("/")
                queue = topology.LOG if of_the_log else topology.lane_queue(Lane(lane))
                raise TopologyError(
                    f"a heartbeat was sent and did not come out of queue {queue!r}: its binding to exchange"
                    f" {topology.CHANGES!r} with routing key {lane!r} is missing. Run `ticketrail migrate`"
                )
        log.warning("bindings_not_proved_yet", missing=missing)
        return False

    def _arrived(self, path: HeartbeatPath, sent_at: datetime) -> None:
        # Ignore an old heartbeat: the same row of PostgreSQL is read repeatedly.
        if path.arrived_at is None or sent_at > path.arrived_at:
            path.arrived_at, path.arrived = sent_at, time.monotonic()
            path.active, path.unanswered = path.arrived, None
            self._changed.set()

    def _note(self, path: HeartbeatPath, sent_at: datetime, noted_at: datetime) -> None:
        self._arrived(path, sent_at)
        if path.noted_at is None or sent_at > path.noted_at:
            path.noted_at, path.noted = sent_at, time.monotonic()
            path.lag = max(0.0, (noted_at - sent_at).total_seconds())


class HeartbeatSender:
    def __init__(self, settings: Settings, postgres: Postgres, publisher: Publisher, watch: HeartbeatMonitor) -> None:
        self._postgres = postgres
        self._publisher = publisher
        self._watch = watch
        self._interval = settings.heartbeat_interval_seconds
        self._epoch: str | None = None
        self.loop = BackgroundLoop("heartbeats", self._run)

    async def start(self) -> None:
        self.loop.start()

    async def stop(self) -> None:
        await self.loop.stop()

    async def _run(self) -> None:
        looking = asyncio.create_task(self._look(), name="heartbeats-look")
        try:
            while True:
                if self._epoch is None:
                    await asyncio.wait([looking])
                await asyncio.gather(*(self._send(lane) for lane in Lane))
                self.loop.turned()
                await asyncio.sleep(self._interval)
                # In a task of its own: a frozen PostgreSQL must not stop the heartbeats.
                if looking.done():
                    looking = asyncio.create_task(self._look(), name="heartbeats-look")
        finally:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)

    async def _look(self) -> None:
        """Reads the epoch of the log, and the heartbeats that other workers have stored: they prove our bindings
        too."""
        try:
            async with self._postgres.connection() as connection:
                self._epoch = await present_epoch(connection) or self._epoch
                for row in await connection.fetch("select lane, sent_at, noted_at from heartbeats"):
                    if row["lane"] in set(Lane):
                        self._watch.note(Lane(row["lane"]), row["sent_at"], row["noted_at"])
        except Exception as error:  # noqa: BLE001  (the last known epoch is good enough)
            log.debug("heartbeats_without_postgres", error=describe(error))

    async def _send(self, lane: Lane) -> None:
        if self._epoch is None:
            return
        heartbeat = Signal(id=str(uuid4()), type=HEARTBEAT, time=now(), lane=lane.value, epoch=self._epoch)
        try:
            await self._publisher.publish(lane.value, encode_signal(heartbeat))
        except (NotSent, InDoubt) as error:
            log.debug("heartbeat_not_sent", lane=lane, error=str(error))
            return
        self._watch.sent(lane)
