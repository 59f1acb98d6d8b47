"""Heartbeats: small messages that go through every lane and the log, so that silence can be told from loss.

`HeartbeatSender` sends one through every lane every few seconds; each goes into the log too. `HeartbeatMonitor`
remembers which ones came out. Arrived and noted are two things: a heartbeat that arrived in a consumer proves the
binding of its lane, one that was noted (committed by PostgreSQL, applied by the mirror writer) says how far that sink
is.

Nothing here waits for PostgreSQL: while it is away the last known epoch of the log is sent, and nothing is sent before
one is known. At shutdown nothing is owed.
"""

import asyncio
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any
from uuid import uuid4

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
from shared.postgres.pool import Postgres
from shared.settings import Settings

log = structlog.get_logger(__name__)


def log_path_of(lane: Lane) -> str:
    """The name of the way through a lane's routing key into the log."""
    return f"log/{lane}"


HEARTBEAT_PATHS = (*(lane.value for lane in Lane), *(log_path_of(lane) for lane in Lane))

_LEAST_READY = 2.0  # seconds


class HeartbeatPath(Struct):
    """What is known of one way: into a lane's queue, or into the log. Ages count on the monotonic clock, times are the
    sender's."""

    unanswered: float | None = None
    """Since when heartbeats that we sent this way have not come out."""
    arrived_at: datetime | None = None
    """The time in the newest heartbeat that came out at the other end."""
    arrived: float = 0.0
    active: float = 0.0
    """When anything came out."""
    noted_at: datetime | None = None
    """The time in the newest heartbeat that the sink has noted."""
    noted: float = 0.0
    lag: float = 0.0
    """Seconds between the sending and the noting of that heartbeat."""


class HeartbeatMonitor:
    def __init__(self, settings: Settings) -> None:
        self._patience = max(3 * settings.heartbeat_interval_seconds, _LEAST_READY)
        self._ways = {name: HeartbeatPath() for name in HEARTBEAT_PATHS}
        self._idle: dict[str, Callable[[], bool]] = {}
        self._news = asyncio.Event()

    # -- what its neighbours tell it ---------------------------------------------------------------------------

    def watch_lane(self, lane: Lane, idle: Callable[[], bool]) -> None:
        """`idle`: true when its consumers are subscribed and hold nothing."""
        self._idle[lane.value] = idle

    def sent(self, lane: Lane) -> None:
        """The broker has confirmed a heartbeat."""
        for name in (lane.value, log_path_of(lane)):
            way = self._ways[name]
            way.unanswered = way.unanswered or time.monotonic()

    def active(self, lane: Lane) -> None:
        """Some message came out of the lane."""
        self._ways[lane.value].active = time.monotonic()

    def arrived(self, lane: Lane, sent_at: datetime) -> None:
        self._arrived(self._ways[lane.value], sent_at)

    def note(self, lane: Lane, sent_at: datetime, noted_at: datetime) -> None:
        """PostgreSQL has committed it."""
        self._note(self._ways[lane.value], sent_at, noted_at)

    def note_log_end(self) -> None:
        """The reader of the log has read to its end: from here on a missing heartbeat means a missing binding."""
        for lane in Lane:
            self._idle[log_path_of(lane)] = lambda: True
            self._ways[log_path_of(lane)].active = time.monotonic()

    def arrived_in_log(self, lane: Lane, sent_at: datetime) -> None:
        """The mirror writer has read it: it proves the binding, also while the mirror is away."""
        self._arrived(self._ways[log_path_of(lane)], sent_at)

    def note_log(self, lane: Lane, sent_at: datetime, noted_at: datetime) -> None:
        """The mirror writer has applied the log up to it."""
        self._note(self._ways[log_path_of(lane)], sent_at, noted_at)

    # -- what it says ------------------------------------------------------------------------------------------

    def readiness(self) -> tuple[bool, dict[str, Any]]:
        """Ready when a heartbeat came out of every way within three intervals; with what is known of each, in
        seconds."""
        stale, ages, lags = self.stale(), self.ages(), self.lags()
        return not stale, {"stale": stale, "age_seconds": ages, "lag_seconds": lags}

    def stale(self) -> list[str]:
        """The ways from which no heartbeat came out for three intervals."""
        soonest = time.monotonic() - self._patience
        return [name for name, way in self._ways.items() if way.arrived_at is None or way.arrived < soonest]

    def ages(self) -> dict[str, float | None]:
        """Seconds since each sink last noted a heartbeat; None: it never has."""
        at = time.monotonic()
        return {name: None if way.noted_at is None else at - way.noted for name, way in self._ways.items()}

    def lags(self) -> dict[str, float | None]:
        """Seconds that the last heartbeat took from its sending into each sink; None: none has."""
        return {name: None if way.noted_at is None else way.lag for name, way in self._ways.items()}

    async def prove(self, timeout: float) -> bool:
        """Waits until a heartbeat that was sent from now on has come out of every way. True: every binding is proved.

        False: not all of them within `timeout` seconds, for which there may be an innocent reason: a backlog before
        the heartbeat, PostgreSQL or the broker away. `readiness` goes on watching. Raises TopologyError where there is
        none: the heartbeat was sent, its queue is empty and listened to, and the heartbeat is not there.
        """
        began = now()
        for way in self._ways.values():
            way.unanswered = None
        deadline = time.monotonic() + timeout
        while missing := self._missing(began):
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return self._judge(missing, timeout)
            self._news.clear()
            try:
                async with asyncio.timeout(remaining):
                    await self._news.wait()
            except TimeoutError:
                continue
        return True

    def _missing(self, began: datetime) -> list[str]:
        return [name for name, way in self._ways.items() if way.arrived_at is None or way.arrived_at < began]

    def _judge(self, missing: list[str], timeout: float) -> bool:
        quiet = min(timeout / 2, 2.0)
        for name in missing:
            way, at = self._ways[name], time.monotonic()
            unanswered = way.unanswered is not None and at - way.unanswered > quiet
            if unanswered and self._idle.get(name, lambda: False)() and at - way.active > quiet:
                of_the_log, _, lane = name.rpartition("/")
                queue = topology.LOG if of_the_log else topology.lane_queue(Lane(lane))
                raise TopologyError(
                    f"a heartbeat was sent and did not come out of queue {queue!r}: its binding to exchange"
                    f" {topology.CHANGES!r} with routing key {lane!r} is missing. Run `ticketrail migrate`"
                )
        log.warning("bindings_not_proved_yet", missing=missing)
        return False

    def _arrived(self, way: HeartbeatPath, sent_at: datetime) -> None:
        # An old one says nothing of the present: the same row is read from PostgreSQL again and again.
        if way.arrived_at is None or sent_at > way.arrived_at:
            way.arrived_at, way.arrived = sent_at, time.monotonic()
            way.active, way.unanswered = way.arrived, None
            self._news.set()

    def _note(self, way: HeartbeatPath, sent_at: datetime, noted_at: datetime) -> None:
        self._arrived(way, sent_at)
        if way.noted_at is None or sent_at > way.noted_at:
            way.noted_at, way.noted = sent_at, time.monotonic()
            way.lag = max(0.0, (noted_at - sent_at).total_seconds())


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
                # Beside the sending: a frozen PostgreSQL must not stop the heartbeats.
                if looking.done():
                    looking = asyncio.create_task(self._look(), name="heartbeats-look")
        finally:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)

    async def _look(self) -> None:
        """The epoch of the log; and the heartbeats that other workers have noted, which prove our bindings too."""
        try:
            async with self._postgres.connection() as connection:
                self._epoch = await present_epoch(connection) or self._epoch
                for row in await connection.fetch("select lane, sent_at, noted_at from heartbeats"):
                    if row["lane"] in set(Lane):
                        self._watch.note(Lane(row["lane"]), row["sent_at"], row["noted_at"])
        except Exception as error:  # noqa: BLE001  (without it the last known epoch is sent)
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
