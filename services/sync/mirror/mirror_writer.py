"""The mirror writer applies every change of the log to the mirror, and decides when the mirror is warm.

Guarantee: every change is applied at least once, under the guard. The mirror stores the position of the writer, and the
same script updates the position and the data. If the mirror was wiped or replaced by an older copy, the writer
therefore notices it and rewinds; the check each second finds that without traffic too. If the mirror still has a
position, the writer continues there. Otherwise it loads the live window from one snapshot of PostgreSQL, and then reads
the log from the newest checkpoint that the log proves: PostgreSQL has everything before it.

A position that the log does not prove: the log has lost entries that the mirror has, and has new ones in their place. A
warm mirror stays warm, and the writer reads the log again from an older place. A cold mirror is filled again, because
it may have lost changes together with the log.

Order: changes are applied in the order of the log.

Warm: warm_up.py says when a mirror becomes warm, so that it takes claims. PostgreSQL gives it a new identity then.

The requests have revealed most changes already. Therefore the writer first asks the mirror which changes it lacks. A
change that the mirror has in the same version or a later one is neither decoded nor sent. The answer is valid only for
this mirror: if another mirror has replaced it, the writer rewinds.

A change whose document the mirror lacks may be an old one that is read again, and the document may have left the live
window. The writer compares it with PostgreSQL, one query for each batch and kind. While PostgreSQL is unavailable, the
change is written as pending.

A change that cannot be applied goes to `sync.mirror.dead.v1`; the writer continues after the confirm. While Redis or
RabbitMQ is unavailable, or PostgreSQL during a rebuild, the writer waits with jittered backoff.

Shutdown: it may be stopped at any time.
"""

import asyncio
import random
import time
from collections.abc import Sequence
from contextlib import aclosing

import asyncpg
import msgspec
import structlog
from msgspec import Struct
from opentelemetry.trace import SpanKind

from services.sync.failures.classification import classify, describe
from services.sync.failures.retry_ladder import PUBLISH_TIMEOUT_SECONDS, FailedChange, headers_for
from services.sync.heartbeat import HeartbeatMonitor, HeartbeatSender
from services.sync.mirror.stored_states import STATES_PER_SCRIPT, Rewind, compared_with_postgres
from services.sync.mirror.warm_up import StartPoint, WarmUp
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
from shared.messaging.log_tap import LogTap
from shared.messaging.position import LogPosition
from shared.messaging.publisher import BROKEN_LINK, InDoubt, NotSent, Publisher
from shared.messaging.topology import LOG, MIRROR_DEAD
from shared.mirror.connection import MirrorInDoubt, MirrorUnavailable
from shared.mirror.mirror import NOTHING_APPLIED, Apply, Mirror
from shared.mirror.stored_heads import StoredHead
from shared.observability.metrics import WriterMetrics
from shared.observability.tracing import Tracer
from shared.postgres import states
from shared.postgres.feed import ForeignDatabase
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
_WAITS = (MirrorUnavailable, MirrorInDoubt, ForeignDatabase, asyncpg.PostgresError, *UNAVAILABLE, *BROKEN_LINK)
"""After these errors the writer begins again."""


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
        tap: LogTap | None = None,
        heartbeats_again_seconds: float = 10.0,
    ) -> None:
        """`tap`: gets the batches that this writer reads. `heartbeats_again_seconds`: see `send_again_seconds` of
        `WarmUp`."""
        self._tracer = tracer
        self._metrics = metrics
        self._settings = settings
        self._postgres = postgres
        self._mirror = mirror
        self._publisher = publisher
        self._watch = watch
        self._tap = tap or LogTap()
        heartbeats = HeartbeatSender(settings, postgres, publisher, watch)
        self.warm_up = WarmUp(settings, postgres, mirror, heartbeats, send_again_seconds=heartbeats_again_seconds)
        self.loop = BackgroundLoop("mirror-writer", self._run)
        self._attempt = 0
        self._server = ""
        self._applied: LogPosition | None = None
        """The position that this writer has applied to the mirror of `_server`."""
        self.warm = False
        self._at_end = False
        """True after the log was read to its end, so that further changes are new."""

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
            except _WAITS as error:
                log.warning("mirror_writer_waits", error=describe(error), attempt=self._attempt)
            self.warm, self._applied = False, None
            self._attempt += 1
            await asyncio.sleep(backoff(self._attempt))

    async def _follow_and_check(self, begun: StartPoint) -> None:
        self._applied, self._server, self.warm = begun.position, begun.server, begun.warm
        tasks = {
            asyncio.create_task(self._follow(begun), name="mirror-follow"),
            asyncio.create_task(self._check_position(), name="mirror-position"),
            asyncio.create_task(self._become_warm(begun), name="mirror-warm-up"),
        }
        try:
            ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for error in [task.exception() for task in ended]:
                if error is not None:
                    raise error
        finally:
            await end_tasks(*tasks)

    async def _become_warm(self, begun: StartPoint) -> None:
        if not begun.warm:
            await self.warm_up.prove(begun)
            await self.warm_up.stamp(self._applied or begun.position, begun.server)
            self.warm = True
        await self.warm_up.load_keys()

    async def _check_position(self) -> None:
        """Finds a mirror that has lost what this writer applied, even if no message arrives. Such a mirror is cold from
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
        position = begun.position
        self._watch.note_log_start()
        self._at_end = False
        try:
            async with aclosing(self._reader().read(begun.start, fallbacks=self.warm_up.fallbacks)) as batches:
                async for batch in batches:
                    self._tap.pass_on(batch)
                    position = await self._take(batch, position)
        finally:
            self._tap.end()

    async def _take(self, batch: LogBatch, position: LogPosition) -> LogPosition:
        """Applies a batch to a mirror that has applied the log to `position`. Returns the new position."""
        # A mirror that has applied nothing has no position to lose: the reader found that the log has lost the
        # place of a checkpoint, and has begun at an older one.
        if batch.broken is not None and position != NOTHING_APPLIED:
            position = await self._go_back(batch.broken)
        for heartbeat in batch.heartbeats:
            if heartbeat.lane in set(Lane):
                self._watch.arrived_in_log(Lane(heartbeat.lane), heartbeat.id, heartbeat.offset)
        began = time.time_ns()
        self._trace(await self.apply_entries(batch.entries, position, batch.last), began)
        position = self._applied = batch.last
        await self._handle_signals(batch)
        self.loop.turned()
        if self.warm and len(batch.entries) < _SMALL_BATCH_MESSAGES:
            await asyncio.sleep(_GATHER_SECONDS)
        return batch.last

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
        self._at_end = False
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
        for change in outlines:
            if self._at_end:  # a change that is read again does not show the lag
                self._metrics.mirror_lag.observe(max(0.0, ended / 1e9 - change.time.timestamp()))
            if self._tracer.will_export(change.traceparent):
                self._tracer.add(
                    change.traceparent,
                    f"mirror {change.subject.partition('/')[0]}",
                    began,
                    ended,
                    kind=SpanKind.CLIENT,
                    attributes={**_ON_MIRROR, "ticketrail.change_id": change.id},
                )

    async def _handle_signals(self, batch: LogBatch) -> None:
        """Handles the signals of an applied batch: the end of the log, and heartbeats."""
        if batch.caught_up:
            self._watch.note_log_end()
            self._at_end, self._attempt = True, 0
        if batch.heartbeats:
            self.warm_up.read_from_log(batch.heartbeats)
            if self.warm and not await self._mirror.is_warm():
                raise Rewind("the mirror has lost its stamp")
            for heartbeat in batch.heartbeats:
                if heartbeat.lane in set(Lane):
                    self._watch.applied_to_mirror(Lane(heartbeat.lane), heartbeat.sent_at, heartbeat.offset, now())

    async def _apply(self, states_to_apply: list[Apply], at: LogPosition, note: LogPosition | None) -> None:
        """Applies states in chunks, because Redis runs no other command while a script runs. The last script also moves
        the position to `note`, after the states without a document, so that after an interruption the writer repeats
        from the previous position."""
        absent: list[Apply] = []
        for start in range(0, len(states_to_apply), STATES_PER_SCRIPT):
            chunk = states_to_apply[start : start + STATES_PER_SCRIPT]
            absent += [chunk[place] for place in await self._apply_chunk(chunk, at, None)]
        compared = await self._from_postgres(absent) if absent else []
        for start in range(0, max(1, len(compared)), STATES_PER_SCRIPT):
            last = start + STATES_PER_SCRIPT >= len(compared)
            await self._apply_chunk(compared[start : start + STATES_PER_SCRIPT], at, note if last else None)

    async def _apply_chunk(self, chunk: list[Apply], at: LogPosition, note: LogPosition | None) -> list[int]:
        return self._check_mirror(
            await self._mirror.apply(chunk, at=at, note=note, server=self._server, only_warm=self.warm)
        )

    def _check_mirror(self, late: list[int] | None) -> list[int]:
        if late is None:
            raise Rewind("another mirror has replaced the one that was filled")
        return late

    async def _from_postgres(self, late: list[Apply]) -> list[Apply]:
        """Compares states whose document the mirror lacks with PostgreSQL: an event that is read again must not restore
        an old state. If PostgreSQL does not answer, the states are pending, until the reconciler looks at them."""
        try:
            async with self._postgres.connection() as connection:
                return await compared_with_postgres(connection, late)
        except (asyncpg.PostgresError, *UNAVAILABLE) as error:
            log.warning("mirror_without_postgres", states=len(late), error=describe(error))
            return [msgspec.structs.replace(one, how="reveal") for one in late]

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
        """Returns the changes that the mirror lacks, and those that cannot be read."""
        known = [(place, change.outline) for place, change in enumerate(found) if change.outline is not None]
        has = {place for place, _ in known}
        for start in range(0, len(known), STATES_PER_SCRIPT):
            chunk = known[start : start + STATES_PER_SCRIPT]
            has -= {chunk[place][0] for place in await self._mirror.missing([outline for _, outline in chunk])}
        return [change for place, change in enumerate(found) if place not in has]

    async def _decode(self, found: list[_Logged]) -> list[Apply]:
        """Decodes the changes. Dead-letters those that cannot be read."""
        readable = []
        for logged in found:
            try:
                change = decode_change(logged.event)
                entity, state = registry.read(change)
            except BrokenContract as error:
                await self._dead(logged.entry, encode_batch([logged.event]), error)
                logged.outline = None
                continue
            readable.append(Apply(entity, state, change.head, bytes(change.data.after), change.time, "late"))
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
