"""Replay from the log: writes what the log has and `changes` lacks, after PostgreSQL came back from a backup.

Guarantee: when `run` returns, every change that was in the log when it was called is in `changes`, is a dead letter, or
was sent to the retry ladder or a dead-letter queue with the broker's confirm. It uses the transaction and the guard of
the worker: no version goes down, and every fact counts once.

Workers and services may run meanwhile. It may be stopped at any time and repeated. While PostgreSQL or RabbitMQ is
unavailable, it waits as long as a consumer would hold its messages.

A change with a dead letter is not tried again, whatever an operator decided about it. Cursors of the pull feed are void
from the first step on (feed_epochs.py). Cursors of the notifier belong to the log, which was not restored: they stay
valid.
"""

from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from datetime import datetime
from typing import Any

import structlog
from msgspec import Struct, field

from services.sync.failures.parsing import digest
from services.sync.failures.retry_ladder import FailedChange, RetryLadder
from services.sync.ledger import store as ledger_store
from services.sync.maintenance import feed_epochs
from services.sync.writer.batch_writer import BatchWriter
from services.sync.writer.batches import ReceivedChange, WriteBatch, parse_batch
from shared.entities.contract import Lane
from shared.messaging.log import LogEntry, LogReader
from shared.messaging.publisher import Publisher
from shared.messaging.topology import dead_queue
from shared.observability.metrics import Metrics, WriterMetrics
from shared.postgres.pool import Postgres
from shared.settings import Settings

log = structlog.get_logger(__name__)

_CHUNK_SIZE = 500


class LogReplayReport(Struct):
    read: int = 0
    """Changes in the log; a change that is in it twice counts twice."""
    missing: int = 0
    """Changes that PostgreSQL did not have."""
    written: int = 0
    dead: int = 0
    """Missing changes that have a dead letter. They are not written."""
    failed: int = 0
    """Changes that were sent to the retry ladder or a dead-letter queue."""
    unreadable: int = 0
    """Events that cannot be read, which the worker has dead-lettered."""
    entities: Counter[str] = field(default_factory=Counter)
    """The number of missing changes per entity."""
    first: datetime | None = None
    """When the first change in the log was accepted. The log has no older changes."""
    last: datetime | None = None
    feed_epoch: str | None = None


class _Message(Struct, frozen=True):
    body: bytes
    headers: Mapping[str, Any] = {}


class LogReplay:
    def __init__(self, settings: Settings, postgres: Postgres, publisher: Publisher, *, dry_run: bool = False) -> None:
        """`postgres`: a pool of the writer role. `publisher`: a started publisher of the exchange for changes. A dry
        run only counts."""
        self._settings = settings
        self._postgres = postgres
        self._dry_run = dry_run
        self._store = BatchWriter(postgres, settings)
        self._ladder = RetryLadder(publisher, settings.retry_steps_ms, WriterMetrics(Metrics()))

    async def run(
        self, *, since: datetime | None = None, progress: Callable[[LogReplayReport], None] = lambda _: None
    ) -> LogReplayReport:
        """`since`: a moment before the backup was taken; None is the beginning of the log. Raises HoldExpired when
        PostgreSQL stays unavailable, or one of UNAVAILABLE."""
        report = LogReplayReport()
        if not self._dry_run:
            async with self._postgres.connection() as connection:
                report.feed_epoch = await feed_epochs.begin(connection, "replayed from the log")
        async for entries in self._entries(since):
            for lane in Lane:
                found = parse_batch(lane, [_Message(entry.body) for entry in entries if lane_of(entry) is lane])
                for start in range(0, len(found.changes), _CHUNK_SIZE):
                    await self._write(lane, found.changes[start : start + _CHUNK_SIZE], report)
                    progress(report)
                if found.failed:
                    await self._send_unreadable(lane, found.failed, report)
        return report

    async def _entries(self, since: datetime | None) -> AsyncIterator[list[LogEntry]]:
        """Yields the entries of the log, up to its present end."""
        reader = LogReader(
            self._settings.rabbitmq_url, name="replay", idle_seconds=self._settings.heartbeat_interval_seconds * 3
        )
        async with aclosing(reader.read(since or "first")) as batches:
            async for batch in batches:
                yield batch.entries
                if batch.caught_up:
                    return

    async def _write(self, lane: Lane, taken: Sequence[ReceivedChange], report: LogReplayReport) -> None:
        report.read += len(taken)
        report.first = report.first or taken[0].written.change.time
        report.last = taken[-1].written.change.time
        missing = await self._missing(taken, report)
        if self._dry_run or not missing:
            return
        refused = await self._store.write(WriteBatch(lane, missing, [], []))
        report.written += len(missing) - len(refused)
        await self._send_on(lane, refused, report)

    async def _missing(self, taken: Iterable[ReceivedChange], report: LogReplayReport) -> list[ReceivedChange]:
        """Returns each change that PostgreSQL lacks once, without changes that have a dead letter."""
        by_name = {one.name: one for one in taken}
        async with self._postgres.connection() as connection:
            synced = await ledger_store.synced(connection, list(by_name))
            lacking = {name: one for name, one in by_name.items() if name[1] not in synced}
            if not lacking:
                return []
            dead = await ledger_store.dead(connection, [change for _, change in lacking])
        report.missing += len(lacking)
        report.dead += len(dead)
        report.entities.update(one.written.entity.name for one in lacking.values())
        return [one for (_, change), one in lacking.items() if change not in dead]

    async def _send_unreadable(self, lane: Lane, failed: Sequence[FailedChange], report: LogReplayReport) -> None:
        """Sends unreadable events that have no dead letter to the dead-letter queue: dead letters that were stored
        after the backup are lost."""
        report.unreadable += len(failed)
        queue = dead_queue(lane)
        digests = {digest(queue, one.body): one for one in failed}
        async with self._postgres.connection() as connection:
            known = await ledger_store.stored_dead_letters(connection, list(digests))
        lost = [one for key, one in digests.items() if key not in known]
        if lost and not self._dry_run:
            await self._send_on(lane, lost, report)

    async def _send_on(self, lane: Lane, failed: Sequence[FailedChange], report: LogReplayReport) -> None:
        if failed:
            report.failed += len(failed)
            if retries := await self._ladder.send(failed, lane, ours=lambda: True):
                await self._store.note_retries(retries)


def lane_of(entry: LogEntry) -> Lane:
    """Returns the lane that the routing key names. An entry without one was not made by a request: it is background."""
    return Lane(entry.lane) if entry.lane in set(Lane) else Lane.BACKGROUND
