"""Heartbeats: small messages that go through every lane and the change log, and show whether a silent path is idle or
broken.

`HeartbeatSender` sends a heartbeat through every lane every few seconds; each heartbeat reaches the log too.
`HeartbeatMonitor` records when a heartbeat arrives at a consumer, which proves the binding of its lane, and when a sink
stores it (PostgreSQL commits it, or the mirror writer applies it), which proves that the sink has everything that was
sent before it.

The clocks of two senders may differ by hours, and a clock may jump. So no decision compares the sending times: a
heartbeat is known by its id, and its age counts from its arrival, on the monotonic clock of this process.

Backend unavailable: the sender needs no PostgreSQL. A heartbeat that RabbitMQ does not confirm is dropped.

Shutdown: it may be stopped at any time, because nothing has to be finished.
"""

import asyncio
import time
from collections.abc import Callable, Collection
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
from shared.postgres.pool import Connection, Postgres
from shared.settings import Settings

log = structlog.get_logger(__name__)


def log_path_of(lane: Lane) -> str:
    """Returns the name of the path into the log that uses the routing key of the lane."""
    return f"log/{lane}"


HEARTBEAT_PATHS = (*(lane.value for lane in Lane), *(log_path_of(lane) for lane in Lane))

_MIN_FRESH_SECONDS = 2.0
_MAX_SENT = 1_000

_STORED = "select id::text from heartbeats where id = any($1::uuid[])"


async def stored_heartbeats(connection: Connection, ids: Collection[str]) -> set[str]:
    """Returns those of the heartbeats that PostgreSQL has committed, so that everything before them has left their
    lanes."""
    return {row["id"] for row in await connection.fetch(_STORED, list(ids))}


# The last heartbeat of each lane, preceded by the last one that this process has sent.
_LAST_STORED = """
(
    select distinct on (lane) lane, id::text, sent_at, at as stored_at from heartbeats where id = any($1::uuid[])
    order by lane, xid desc, sent_at desc
)
union all select lane, id::text, sent_at, stored_at from last_heartbeats
"""


class HeartbeatPath(Struct):
    """The state of one path: into the queue of a lane, or into the log. All times are on the monotonic clock of this
    process."""

    missing_since: float | None = None
    """The sending time of the oldest heartbeat that has not arrived; None if all have arrived."""
    arrived: float | None = None
    """The time at which the last heartbeat arrived; None if none did."""
    proved: float = 0.0
    """The sending time of the last heartbeat of this process that has arrived."""
    active: float = 0.0
    """The time at which the last message of any kind arrived."""
    stored: float | None = None
    """The time at which this process learned that the sink has stored another heartbeat; None if it has stored none."""
    lag: float = 0.0
    """The seconds from the sending of that heartbeat until the sink had stored it, by the clocks of both."""
    log_offset: int = -1
    """The offset of the newest heartbeat that was read from the log."""


class HeartbeatMonitor:
    def __init__(self, settings: Settings) -> None:
        self._fresh_seconds = max(3 * settings.heartbeat_interval_seconds, _MIN_FRESH_SECONDS)
        self._paths = {name: HeartbeatPath() for name in HEARTBEAT_PATHS}
        self._idle: dict[str, Callable[[], bool]] = {}
        self._sent: dict[str, float] = {}
        """Id of a heartbeat of this process -> its sending time."""
        self._changed = asyncio.Event()

    # -- called by sender and consumers ------------------------------------------------------------------------

    def watch_lane(self, lane: Lane, idle: Callable[[], bool]) -> None:
        """Registers a function that returns True while the consumers of the lane are subscribed and hold no
        messages."""
        self._idle[lane.value] = idle

    def sending(self, id_: str) -> None:
        """Records that this process sends a heartbeat, before it can arrive."""
        self._sent[id_] = time.monotonic()
        if len(self._sent) > _MAX_SENT:
            del self._sent[next(iter(self._sent))]

    @property
    def sent_ids(self) -> list[str]:
        """The last heartbeats of this process, which may be in any store."""
        return list(self._sent)

    def sent(self, lane: Lane) -> None:
        """Records that the broker has confirmed a heartbeat."""
        for name in (lane.value, log_path_of(lane)):
            path = self._paths[name]
            path.missing_since = path.missing_since or time.monotonic()

    def active(self, lane: Lane) -> None:
        """Records that a consumer of the lane has received a message of any kind."""
        self._paths[lane.value].active = time.monotonic()

    def arrived(self, lane: Lane, id_: str) -> None:
        """Records that a consumer of the lane has received a heartbeat."""
        self._note_arrival(self._paths[lane.value], id_)

    def stored(self, lane: Lane, id_: str, sent_at: datetime, stored_at: datetime) -> None:
        """Records that PostgreSQL has committed another heartbeat."""
        self._note_arrival(self._paths[lane.value], id_)
        self._note_storing(self._paths[lane.value], sent_at, stored_at)

    def note_log_end(self) -> None:
        """Records that the mirror writer has read the log to its end. From now on, a heartbeat that is missing in the
        log means that a binding is missing."""
        for lane in Lane:
            self._idle[log_path_of(lane)] = lambda: True
            self._paths[log_path_of(lane)].active = time.monotonic()

    def note_log_start(self) -> None:
        """Records that the mirror writer begins to read, or goes back because the log has lost its end: the next
        heartbeat may have any offset."""
        for lane in Lane:
            self._paths[log_path_of(lane)].log_offset = -1

    def arrived_in_log(self, lane: Lane, id_: str, offset: int) -> None:
        """Records that the mirror writer has read a heartbeat, even if the mirror is unavailable. This proves the
        binding."""
        path = self._paths[log_path_of(lane)]
        if offset > path.log_offset:
            path.log_offset = offset
            self._note_arrival(path, id_)

    def applied_to_mirror(self, lane: Lane, sent_at: datetime, offset: int, applied_at: datetime) -> None:
        """Records that the mirror writer has applied the log up to the heartbeat."""
        path = self._paths[log_path_of(lane)]
        if offset >= path.log_offset:
            self._note_storing(path, sent_at, applied_at)

    # -- results ------------------------------------------------------------------------------------------

    def readiness(self) -> tuple[bool, dict[str, Any]]:
        """Returns (ready, details for the health endpoint). Ready means that a heartbeat of every path arrived within
        three intervals. Ages and lags are in seconds."""
        stale, ages, lags = self.stale(), self.ages(), self.lags()
        return not stale, {"stale": stale, "age_seconds": ages, "lag_seconds": lags}

    def stale(self) -> list[str]:
        """Returns the paths of which no heartbeat has arrived for three intervals."""
        earliest = time.monotonic() - self._fresh_seconds
        return [name for name, path in self._paths.items() if path.arrived is None or path.arrived < earliest]

    def ages(self) -> dict[str, float | None]:
        """Returns the seconds since each sink last stored a heartbeat; None if it never did."""
        at = time.monotonic()
        return {name: None if path.stored is None else at - path.stored for name, path in self._paths.items()}

    def lags(self) -> dict[str, float | None]:
        """Returns the seconds from sending to storing the last heartbeat of each path; None if none was stored."""
        return {name: None if path.stored is None else path.lag for name, path in self._paths.items()}

    async def prove(self, timeout: float) -> bool:
        """Waits until a heartbeat of every path has arrived that was sent after this call. Returns True then, because
        every binding is proved.

        Returns False if a heartbeat is missing after `timeout` seconds for a reason that may be harmless: it waits
        behind a backlog, or PostgreSQL or the broker is unavailable. `readiness` continues to check. Raises
        TopologyError if there is no such reason: the heartbeat was sent, its queue is empty and has consumers, and the
        heartbeat did not arrive.
        """
        began = time.monotonic()
        for path in self._paths.values():
            path.missing_since = None
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

    def _missing(self, began: float) -> list[str]:
        return [name for name, path in self._paths.items() if path.proved < began]

    def _check_missing(self, missing: list[str], timeout: float) -> bool:
        quiet_seconds = min(timeout / 2, 2.0)
        for name in missing:
            path, at = self._paths[name], time.monotonic()
            overdue = path.missing_since is not None and at - path.missing_since > quiet_seconds
            if overdue and self._idle.get(name, lambda: False)() and at - path.active > quiet_seconds:
                of_the_log, _, lane = name.rpartition("/")
                queue = topology.LOG if of_the_log else topology.lane_queue(Lane(lane))
                raise TopologyError(
                    f"a heartbeat was sent and did not arrive through queue {queue!r}: the binding to exchange"
                    f" {topology.CHANGES!r} with routing key {lane!r} is missing. Run `ticketrail migrate`"
                )
        log.warning("bindings_not_proved_yet", missing=missing)
        return False

    def _note_arrival(self, path: HeartbeatPath, id_: str) -> None:
        path.arrived = path.active = time.monotonic()
        path.missing_since = None
        path.proved = max(path.proved, self._sent.get(id_, 0.0))
        self._changed.set()

    def _note_storing(self, path: HeartbeatPath, sent_at: datetime, stored_at: datetime) -> None:
        path.stored = time.monotonic()
        path.lag = max(0.0, (stored_at - sent_at).total_seconds())


class HeartbeatSender:
    def __init__(self, settings: Settings, postgres: Postgres, publisher: Publisher, watch: HeartbeatMonitor) -> None:
        self._postgres = postgres
        self._publisher = publisher
        self._watch = watch
        self._read: set[str] = set()
        """The heartbeats that were read in PostgreSQL last."""
        self._interval = settings.heartbeat_interval_seconds
        self.loop = BackgroundLoop("heartbeats", self._run)

    async def start(self) -> None:
        self.loop.start()

    async def stop(self) -> None:
        await self.loop.stop()

    async def _run(self) -> None:
        looking = asyncio.create_task(self._read_postgres(), name="heartbeats-read")
        try:
            while True:
                await asyncio.gather(*(self.send_now(lane, str(uuid4())) for lane in Lane))
                self.loop.turned()
                await asyncio.sleep(self._interval)
                # Read in a task of its own, because a frozen PostgreSQL must not stop the heartbeats.
                if looking.done():
                    looking = asyncio.create_task(self._read_postgres(), name="heartbeats-read")
        finally:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)

    async def _read_postgres(self) -> None:
        """Reads the heartbeats that other workers have stored, because these prove the bindings too: those of this
        process among them, and the last one of each lane."""
        try:
            async with self._postgres.connection() as connection:
                rows = await connection.fetch(_LAST_STORED, self._watch.sent_ids)
                for row in rows:
                    if row["lane"] in set(Lane) and row["id"] not in self._read:
                        self._watch.stored(Lane(row["lane"]), row["id"], row["sent_at"], row["stored_at"])
                self._read = {row["id"] for row in rows}
        except Exception as error:  # noqa: BLE001  (the next round reads again)
            log.debug("heartbeats_without_postgres", error=describe(error))

    async def send_now(self, lane: Lane, id_: str) -> bool:
        """Sends a heartbeat through a lane and the log. Returns whether the broker has confirmed it."""
        heartbeat = Signal(id=id_, type=HEARTBEAT, time=now(), lane=lane.value)
        self._watch.sending(id_)
        try:
            await self._publisher.publish(lane.value, encode_signal(heartbeat))
        except (NotSent, InDoubt) as error:
            log.debug("heartbeat_not_sent", lane=lane, error=str(error))
            return False
        self._watch.sent(lane)
        return True
