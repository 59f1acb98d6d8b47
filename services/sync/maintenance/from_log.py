"""The replay from the log: after PostgreSQL was restored from a backup, it writes the changes that the log has and
`changes` lacks.

Guarantee: when `run` returns, every change that was in the log when `run` was called is in `changes`, is a dead letter,
or was confirmed by the broker in a retry queue or a dead-letter queue. The replay writes by the same transaction and
guard as the PostgreSQL writer, so no entity returns to an older version, and every fact counts once.

Workers and services may run during the replay. It may be stopped at any time and repeated. While PostgreSQL or RabbitMQ
is unavailable, it waits as long as a consumer would hold its messages.

The replay does not write a change that has a dead letter in any status. Cursors of the notifier stay valid, because
they belong to the log, which was not restored.
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
    """The number of changes in the log. A change that the log has twice counts twice."""
    missing: int = 0
    """The number of changes that PostgreSQL lacked."""
    written: int = 0
    dead: int = 0
    """The number of missing changes that have a dead letter. The replay does not write them."""
    failed: int = 0
    """The number of changes that were sent to the retry ladder or a dead-letter queue."""
    unreadable: int = 0
    """The number of events that cannot be read. The worker has dead-lettered them before."""
    entities: Counter[str] = field(default_factory=Counter)
    """The number of missing changes per entity."""
    first: datetime | None = None
    """The time when the first change in the log was accepted. The log cannot replay older changes."""
    last: datetime | None = None


class _Message(Struct, frozen=True):
    body: bytes
    headers: Mapping[str, Any] = {}


class LogReplay:
    def __init__(self, settings: Settings, postgres: Postgres, publisher: Publisher, *, dry_run: bool = False) -> None:
        """`postgres`: a pool of the writer role. `publisher`: a started publisher. `dry_run`: only count."""
        self._settings = settings
        self._postgres = postgres
        self._dry_run = dry_run
        self._store = BatchWriter(postgres, settings)
        self._ladder = RetryLadder(publisher, settings.retry_steps_ms, WriterMetrics(Metrics()))

    async def run(
        self, *, since: datetime | None = None, progress: Callable[[LogReplayReport], None] = lambda _: None
    ) -> LogReplayReport:
        """Runs the replay. `since`: a moment before the backup was taken; None is the beginning of the log. Raises
        HoldExpired if PostgreSQL stays unavailable during a write, and one of UNAVAILABLE if it is unavailable during
        a query."""
        report = LogReplayReport()
        async for entries in self._entries(since):
            for lane in Lane:
                found = parse_batch(lane, [_Message(entry.body) for entry in entries if lane_of_entry(entry) is lane])
                for start in range(0, len(found.changes), _CHUNK_SIZE):
                    await self._write(lane, found.changes[start : start + _CHUNK_SIZE], report)
                    progress(report)
                if found.failed:
                    await self._send_unreadable(lane, found.failed, report)
        return report

    async def _entries(self, since: datetime | None) -> AsyncIterator[list[LogEntry]]:
        """Yields the entries of the log, up to its current end."""
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
        report.first = report.first or taken[0].decoded.change.time
        report.last = taken[-1].decoded.change.time
        missing = await self._missing(taken, report)
        if self._dry_run or not missing:
            return
        written = await self._store.write(WriteBatch(lane, missing, [], []))
        report.written += len(missing) - len(written.failed)
        report.failed += len(written.dead)
        await self._send_on(lane, written.unsent, report)

    async def _missing(self, taken: Iterable[ReceivedChange], report: LogReplayReport) -> list[ReceivedChange]:
        """Returns the changes that PostgreSQL lacks, each once, and without those that have a dead letter."""
        by_name = {received.name: received for received in taken}
        async with self._postgres.connection() as connection:
            synced = await ledger_store.synced(connection, list(by_name))
            lacking = {name: received for name, received in by_name.items() if name[1] not in synced}
            if not lacking:
                return []
            dead = await ledger_store.dead(connection, [change for _, change in lacking])
        report.missing += len(lacking)
        report.dead += len(dead)
        report.entities.update(received.decoded.entity.name for received in lacking.values())
        return [received for (_, change), received in lacking.items() if change not in dead]

    async def _send_unreadable(self, lane: Lane, failed: Sequence[FailedChange], report: LogReplayReport) -> None:
        """Sends the unreadable events that have no dead letter to the dead-letter queue, because PostgreSQL has lost
        the dead letters that were stored after the backup."""
        report.unreadable += len(failed)
        queue = dead_queue(lane)
        digests = {digest(queue, failed_change.body): failed_change for failed_change in failed}
        async with self._postgres.connection() as connection:
            known = await ledger_store.stored_dead_letters(connection, list(digests))
        lost = [failed_change for key, failed_change in digests.items() if key not in known]
        if lost and not self._dry_run:
            await self._send_on(lane, lost, report)

    async def _send_on(self, lane: Lane, failed: Sequence[FailedChange], report: LogReplayReport) -> None:
        if failed:
            report.failed += len(failed)
            if retries := await self._ladder.send(failed, lane, ours=lambda: True):
                await self._store.note_retries(retries)


def lane_of_entry(entry: LogEntry) -> Lane:
    """Returns the lane that the routing key names. An entry without a lane counts as background, because no request
    made it."""
    return Lane(entry.lane) if entry.lane in set(Lane) else Lane.BACKGROUND
