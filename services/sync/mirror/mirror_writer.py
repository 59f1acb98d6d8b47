"""The mirror writer applies every change of the log to the mirror, and decides when the mirror is warm.

Guarantee: every change is applied at least once, under the guard. The mirror stores the position of the writer, and the
same script updates the position and the data. If the mirror was wiped or replaced by an older copy, the writer
therefore notices it and rewinds; the check each second finds that without traffic too. If the mirror still has a
position, the writer continues there. Otherwise it loads the live window from PostgreSQL, and then reads the log from
ten minutes before PostgreSQL's last heartbeat.

A position that the log does not prove: the log has lost entries that the mirror has, and has new ones in their place. A
warm mirror stays warm, and the writer reads the log again from an older place. A cold mirror is filled again, because
it may have lost changes together with the log.

Order: changes are applied in the order of the log.

Warm: a mirror takes claims when the log has been read to its end and `mirror_settle_seconds` have passed since the
mirror was found cold. By then, changes that were claimed on a lost mirror are recorded and read. A new system does not
wait, because nothing can be in flight there. PostgreSQL gives the mirror a new identity, so a lost mirror stays cold
while PostgreSQL is unavailable.

The requests have revealed most changes already. Therefore the writer first asks a warm mirror which changes it lacks. A
change that the mirror has in the same version or a later one is neither decoded nor sent. The answer is valid only for
this mirror: if another mirror has replaced it, the writer rewinds.

A change that cannot be applied goes to `sync.mirror.dead.v1`; the writer continues after the confirm. While Redis or
RabbitMQ is unavailable, or PostgreSQL during a rebuild, the writer waits with jittered backoff.

Shutdown: it may be stopped at any time.
"""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from datetime import datetime

import msgspec
import structlog
from msgspec import Struct
from opentelemetry.trace import SpanKind

from services.sync.failures.classification import classify
from services.sync.failures.retry_ladder import PUBLISH_TIMEOUT_SECONDS, FailedChange, headers_for
from services.sync.heartbeat import HeartbeatMonitor
from services.sync.mirror.warm_up import (
    OVERLAP,
    STATES_PER_SCRIPT,
    Rewind,
    StartPoint,
    WarmUp,
    stored_state,
)
from shared.backoff import backoff
from shared.entities import registry
from shared.entities.contract import (
    BrokenContract,
    Lane,
    Outline,
    decode_change,
    encode_batch,
    now,
    outline,
    split_batch,
)
from shared.lifecycle import BackgroundLoop, end_tasks
from shared.messaging.log import BrokenPosition, LogBatch, LogEntry, LogReader
from shared.messaging.position import LogPosition
from shared.messaging.publisher import BROKEN_LINK, InDoubt, NotSent, Publisher
from shared.messaging.topology import LOG, MIRROR_DEAD
from shared.mirror.connection import MirrorInDoubt, MirrorUnavailable
from shared.mirror.mirror import NOTHING_APPLIED, Apply, Mirror
from shared.mirror.stored_heads import StoredHead
from shared.observability.metrics import WriterMetrics
from shared.observability.tracing import Tracer
from shared.postgres import states
from shared.postgres.pool import UNAVAILABLE, Postgres
from shared.settings import Settings

log = structlog.get_logger(__name__)

_ON_MIRROR = {
    "db.system.name": "redis",
    "db.operation.name": "EVALSHA",
    "db.stored_procedure.name": "apply",
    "messaging.destination.name": LOG,
}
# Requests reveal their changes themselves, so the writer may pause after a small batch. The next batch is then larger,
# which saves round trips to the mirror.
_GATHER_SECONDS = 0.02
_SMALL_BATCH_MESSAGES = 50
_POSITION_CHECK_SECONDS = 1.0


class _Logged(Struct):
    """One change of the log, of which only the outline is decoded."""

    entry: LogEntry
    event: bytes
    outline: Outline | None
    """The attributes that identify the change; None for an unreadable change."""


class MirrorWriter:
    def __init__(
        self,
        settings: Settings,
        postgres: Postgres,
        mirror: Mirror,
        publisher: Publisher,
        watch: HeartbeatMonitor,
        tracer: Tracer,
        metrics: WriterMetrics,
        *,
        clock: Callable[[], datetime] = now,
    ) -> None:
        """`clock`: returns the present time, from which the age of a change counts."""
        self._clock = clock
        self._tracer = tracer
        self._metrics = metrics
        self._settings = settings
        self._postgres = postgres
        self._mirror = mirror
        self._publisher = publisher
        self._watch = watch
        self.warm_up = WarmUp(settings, postgres, mirror)
        self.loop = BackgroundLoop("mirror-writer", self._run)
        self._attempt = 0
        self._server = ""
        self._applied: LogPosition | None = None
        """The position that this writer has applied to the mirror of `_server`."""
        self.warm = False

    def start(self) -> None:
        self.loop.start()

    async def stop(self) -> None:
        await self.loop.stop()

    async def _run(self) -> None:
        while True:
            try:
                await self._follow_and_check(await self.warm_up.begin())
            except Rewind as rewind:
                log.warning("mirror_rewind", reason=str(rewind))
            except (MirrorUnavailable, MirrorInDoubt, *UNAVAILABLE, *BROKEN_LINK) as error:
                log.warning("mirror_writer_waits", error=str(error) or type(error).__name__, attempt=self._attempt)
            self.warm, self._applied = False, None
            self._attempt += 1
            await asyncio.sleep(backoff(self._attempt))

    async def _follow_and_check(self, begun: StartPoint) -> None:
        tasks = {
            asyncio.create_task(self._follow(begun), name="mirror-follow"),
            asyncio.create_task(self._check_position(), name="mirror-position"),
        }
        try:
            ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for error in [task.exception() for task in ended]:
                if error is not None:
                    raise error
        finally:
            await end_tasks(*tasks)

    async def _check_position(self) -> None:
        """Finds a mirror that has lost what this writer applied, also if no message arrives. Such a mirror is cold from
        then on, even if its stamp names its server, because somebody restored an old copy."""
        while True:
            await asyncio.sleep(_POSITION_CHECK_SECONDS)
            if self._applied is not None:
                self._check_mirror(await self._mirror.apply([], at=self._applied, server=self._server))

    def _reader(self) -> LogReader:
        return LogReader(
            self._settings.rabbitmq_url,
            name="mirror-writer",
            idle_seconds=self._settings.heartbeat_interval_seconds * 3,
        )

    # -- following the log -------------------------------------------------------------------------------------

    async def _follow(self, begun: StartPoint) -> None:
        position = self._applied = begun.position
        self._server, self.warm = begun.server, begun.warm
        if not self.warm:
            # Start to read after the settle period, so that the mark at the end of the log comes after every change
            # that was in flight.
            await asyncio.sleep(max(0.0, begun.settled_at - time.monotonic()))
        self._watch.note_log_start()
        async with aclosing(self._reader().read(begun.start, fallbacks=self.warm_up.fallbacks)) as batches:
            async for batch in batches:
                if batch.broken is not None:
                    position = await self._go_back(batch.broken)
                for heartbeat in batch.heartbeats:
                    if heartbeat.lane in set(Lane):
                        self._watch.arrived_in_log(Lane(heartbeat.lane), heartbeat.sent_at, heartbeat.offset)
                began = time.time_ns()
                self._trace(await self.apply_entries(batch.entries, position, batch.last), began)
                position = self._applied = batch.last
                await self._handle_signals(batch, position)
                self.loop.turned()
                if self.warm and len(batch.entries) < _SMALL_BATCH_MESSAGES:
                    await asyncio.sleep(_GATHER_SECONDS)

    async def _go_back(self, broken: BrokenPosition) -> LogPosition:
        """Moves the position of the mirror back, and returns the new one. Raises Rewind if the mirror has another
        position, or is cold."""
        to = broken.back_to if isinstance(broken.back_to, LogPosition) else NOTHING_APPLIED
        self._applied = None  # the check must not compare the mirror with a position that it loses now
        if not await self._mirror.go_back(broken.position, to if self.warm else NOTHING_APPLIED):
            raise Rewind("another mirror writer has moved the position of the mirror")
        if not self.warm:
            raise Rewind(f"the position of a cold mirror is {broken.reason}")
        self._watch.note_log_start()
        self._applied = to
        return to

    async def apply_entries(
        self, entries: Sequence[LogEntry], at: LogPosition, note: LogPosition | None
    ) -> list[Outline]:
        """Applies the changes that the mirror lacks, and then stores the position `note` in the mirror. The mirror must
        have applied the log at least to `at`. Returns the outlines of the readable changes."""
        found = await self._split(entries)
        await self._apply(await self._decode(await self._missing(found)), at, note)
        return [logged.outline for logged in found if logged.outline is not None]

    def _trace(self, outlines: list[Outline], began: int) -> None:
        ended = time.time_ns()
        oldest = ended / 1e9 - OVERLAP.total_seconds()
        for change in outlines:
            accepted = change.time.timestamp()
            if accepted > oldest:  # an old change was read again after a rewind, so it does not show the lag
                self._metrics.mirror_lag.observe(max(0.0, ended / 1e9 - accepted))
            if self._tracer.will_export(change.traceparent):
                self._tracer.add(
                    change.traceparent,
                    f"mirror {change.subject.partition('/')[0]}",
                    began,
                    ended,
                    kind=SpanKind.CLIENT,
                    attributes={**_ON_MIRROR, "ticketrail.change_id": change.id},
                )

    async def _handle_signals(self, batch: LogBatch, position: LogPosition) -> None:
        """Handles the signals of an applied batch: the end of the log, and heartbeats."""
        if batch.caught_up:
            self._watch.note_log_end()
            self._attempt = 0
            if not self.warm:
                await self.warm_up.stamp(position, self._server)
                self.warm = True
        if batch.heartbeats:
            if self.warm and not await self._mirror.is_warm():
                raise Rewind("the mirror has lost its stamp")
            for heartbeat in batch.heartbeats:
                if heartbeat.lane in set(Lane):
                    self._watch.applied_to_mirror(Lane(heartbeat.lane), heartbeat.sent_at, heartbeat.offset, now())

    async def _apply(self, states_to_apply: list[Apply], at: LogPosition, note: LogPosition | None) -> None:
        """Applies states in chunks, because Redis runs no other command while a script runs. The last script also moves
        the position to `note`, after the repair of late changes, so that after an interruption the writer repeats from
        the previous position."""
        chunks = [
            states_to_apply[start : start + STATES_PER_SCRIPT]
            for start in range(0, len(states_to_apply), STATES_PER_SCRIPT)
        ] or [[]]
        repairs = any(apply.how == "late" for apply in states_to_apply)
        for place, chunk in enumerate(chunks, start=1):
            last = place == len(chunks) and not repairs
            late = self._check_mirror(
                await self._mirror.apply(
                    chunk, at=at, note=note if last else None, server=self._server, only_warm=self.warm
                )
            )
            if late:
                await self._mirror.apply(await self._from_postgres([chunk[place] for place in late]))
        if repairs and note is not None:
            self._check_mirror(await self._mirror.apply([], at=at, note=note, server=self._server, only_warm=self.warm))

    def _check_mirror(self, late: list[int] | None) -> list[int]:
        if late is None:
            raise Rewind("another mirror has replaced the one that was filled")
        return late

    async def _from_postgres(self, late: list[Apply]) -> list[Apply]:
        """Replaces the states of old events by the states in PostgreSQL: if the mirror lacks a document, an old event
        must not restore an old state. Keeps the state of the event if PostgreSQL is behind it."""
        found = []
        async with self._postgres.connection() as connection:
            for late_apply in late:
                stored = await states.find_state(
                    connection, late_apply.entity, late_apply.state.restaurant_id, late_apply.state.id
                )
                if stored is None or stored.head < late_apply.head:
                    found.append(msgspec.structs.replace(late_apply, how="reveal"))
                elif late_apply.entity.live(late_apply.entity.decode_state(stored.state)):
                    found.append(stored_state(late_apply.entity, stored))
        return found

    async def would_apply(self, event: bytes) -> bool:
        """Returns False if the mirror has this change or a later one. Raises MirrorUnavailable, MirrorInDoubt."""
        seen = outline(event)
        return seen is not None and bool(await self._mirror.missing([seen]))

    async def apply_again(self, event: bytes) -> None:
        """Applies a change that failed before, for a replay. Raises BrokenContract, MirrorUnavailable, MirrorInDoubt or
        one of UNAVAILABLE."""
        change = decode_change(event)
        entity, state = registry.read(change)
        late_apply = Apply(entity, state, change.head, bytes(change.data.after), change.time, "late")
        if await self._mirror.apply([late_apply]):
            await self._mirror.apply(await self._from_postgres([late_apply]))
        # PostgreSQL may have committed the change while the mirror had no document for it, so set the sync state now.
        async with self._postgres.connection() as connection:
            found = await states.heads(connection, entity, change.restaurantid, [change.entity_id])
        if found:
            standing = [StoredHead(change.restaurantid, entity.name, id_, head) for id_, head in found.items()]
            await self._mirror.settle(standing)

    async def _split(self, entries: Sequence[LogEntry]) -> list[_Logged]:
        found = []
        for entry in entries:
            try:
                found += [_Logged(entry, event, outline(event)) for event in split_batch(entry.body)]
            except BrokenContract as error:
                await self._dead(entry, entry.body, error)
        return found

    async def _missing(self, found: list[_Logged]) -> list[_Logged]:
        """Returns the changes that a warm mirror lacks, and those that cannot be read. For a cold mirror, returns
        all."""
        if not self.warm:
            return found
        known = [(place, change.outline) for place, change in enumerate(found) if change.outline is not None]
        has = {place for place, _ in known}
        for start in range(0, len(known), STATES_PER_SCRIPT):
            chunk = known[start : start + STATES_PER_SCRIPT]
            has -= {chunk[place][0] for place in await self._mirror.missing([outline for _, outline in chunk])}
        return [change for place, change in enumerate(found) if place not in has]

    async def _decode(self, found: list[_Logged]) -> list[Apply]:
        """Decodes the changes. Dead-letters those that cannot be read."""
        late_before = self._clock() - OVERLAP
        readable = []
        for logged in found:
            try:
                change = decode_change(logged.event)
                entity, state = registry.read(change)
            except BrokenContract as error:
                await self._dead(logged.entry, encode_batch([logged.event]), error)
                logged.outline = None
                continue
            how = "late" if change.time < late_before else "reveal"
            readable.append(Apply(entity, state, change.head, bytes(change.data.after), change.time, how))
        return readable

    async def _dead(self, entry: LogEntry, body: bytes, error: BrokenContract) -> None:
        failed = FailedChange(body, {}, classify(error), now())
        headers = {**headers_for(failed, entry.lane), "ticketrail-log-offset": entry.offset}
        log.error("mirror_dead_letter", reason=error.reason, error=str(error), offset=entry.offset)
        while True:
            try:
                return await self._publisher.publish_to_queue(
                    MIRROR_DEAD, body, headers=headers, timeout=PUBLISH_TIMEOUT_SECONDS
                )
            except (NotSent, InDoubt) as unavailable:
                log.warning("mirror_dead_letter_waits", error=str(unavailable))
                await asyncio.sleep(random.uniform(0.2, 0.5))  # noqa: S311  (jitter)
