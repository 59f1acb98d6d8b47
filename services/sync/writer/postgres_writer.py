"""The PostgreSQL writer: writes the changes that wait in the lanes into the tables, in batches.

    take ─► parse ─► write ─┬─────────────────────────► acknowledge ─► wake the feed loop
                            └─► forward failed changes ─┘

Guarantee: a message is acknowledged only after each change in it is committed in PostgreSQL or stored there as a dead
letter, or confirmed by the broker in a retry queue or a dead-letter queue. If the acknowledgement is lost, the message
is delivered again, and writing it again is idempotent.

Order: the writer does not keep the order of changes, because the guard decides which state wins. Several consumers
share each lane.

A change that no retry can write is stored as a dead letter in the transaction of its batch, so that a burst of bad
changes does not delay the good ones. Its dead-letter queue is for the dead letters that PostgreSQL refuses, and for
messages that the broker dead-letters itself; the collector stores those.

All other failed changes go to the retry ladder while the next batch is written. A message is acknowledged when all of
its changes are committed, stored or confirmed.

While PostgreSQL is unavailable, batches are held (`batch_writer`), and the prefetch limits the number of held messages.
After `sink_hold_seconds` the consumers release their messages, and subscribe again when PostgreSQL answers. While
RabbitMQ is unavailable, the consumers reconnect until it answers (`intake`). The writer knows no mirror: the feed loop
(mirror/feed_loop.py) tells the mirror what is committed and what failed.

Shutdown: deliveries stop, and the taken messages are finished and acknowledged within 10 seconds. A message that cannot
be finished, for example because PostgreSQL is unavailable, returns to its queue.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from typing import Any

import structlog

from services.sync.failures.classification import describe
from services.sync.failures.retry_ladder import FailedChange, RetryLadder, headers_for, log_failed
from services.sync.heartbeat import HeartbeatMonitor
from services.sync.writer.batch_spans import trace_batch
from services.sync.writer.batch_writer import BatchWriter, HoldExpired, Written
from services.sync.writer.batches import WriteBatch, parse_batch
from services.sync.writer.intake import Intake
from services.sync.writer.prefetch import LanePrefetch
from shared.entities.contract import Lane, now
from shared.lifecycle import BackgroundLoop
from shared.messaging.publisher import Publisher
from shared.messaging.subscription import Delivery
from shared.messaging.topology import dead_queue
from shared.observability.metrics import WriterMetrics
from shared.observability.tracing import Tracer
from shared.postgres.pool import Postgres
from shared.settings import Settings

log = structlog.get_logger(__name__)

_MAX_FAILURES_LOGGED_ALONE = 8  # per batch
_SHUTDOWN_GRACE_SECONDS = 6.5  # a stop may take 10 seconds, and closing the connections needs the rest


class Batcher:
    """One consumer of one lane. It has its own channel, and holds its own batches while PostgreSQL is unavailable."""

    def __init__(
        self,
        settings: Settings,
        lane: Lane,
        postgres: Postgres,
        publisher: Publisher,
        watch: HeartbeatMonitor,
        committed: Callable[[], None],
        tracer: Tracer,
        metrics: WriterMetrics,
        prefetch: LanePrefetch,
    ) -> None:
        self.lane = lane
        self.loop = BackgroundLoop(f"postgres-writer-{lane}", self.run)
        self._metrics = metrics
        self._tracer = tracer
        self.intake = Intake(settings, lane, watch, prefetch)
        self.store = BatchWriter(postgres, settings)
        self._ladder = RetryLadder(publisher, settings.retry_steps_ms, metrics)
        self._open_steps: Counter[Delivery] = Counter()
        """The number of steps per message that must still finish before it may be acknowledged."""
        self._sending: set[asyncio.Task[None]] = set()
        self._settling = asyncio.Lock()
        self._broken = asyncio.Event()
        """An event that is set when the consumer must return all messages to the broker and start again."""
        self._watch = watch
        self._committed = committed
        self.written = 0
        self.failed = 0
        self.last_batch = 0
        self.last_commit_at: datetime | None = None

    async def run(self) -> None:
        """Writes batches until `intake.end` is called. Returns when all messages that were taken are acknowledged."""
        try:
            await self.intake.open()
            while True:
                try:
                    taken = await self._take()
                    if taken:
                        await self._handle(taken)
                        self.loop.turned()
                    elif not self._broken.is_set():
                        break
                except HoldExpired as error:
                    log.warning("lane_released", lane=self.lane, error=str(error))
                    self._broken.set()
                except Exception:
                    # This is a bug of ours that no change has caused. The messages are delivered again; if the error
                    # stays, the delivery limit moves them to the dead-letter queue.
                    log.exception("batch_failed", lane=self.lane)
                    self._broken.set()
                if self._broken.is_set():
                    await self._restart()
            await self._wait_for_sends()
        finally:
            for task in self._sending:
                task.cancel()

    async def _take(self) -> list[Delivery]:
        """Takes messages like `intake.take`, but returns an empty list if `_broken` is set during the wait."""
        taking = asyncio.ensure_future(self.intake.take())
        broken = asyncio.ensure_future(self._broken.wait())
        try:
            await asyncio.wait({taking, broken}, return_when=asyncio.FIRST_COMPLETED)
            return taking.result() if taking.done() else []
        finally:
            taking.cancel()
            broken.cancel()

    async def _restart(self) -> None:
        await self.intake.close()  # the broker delivers all messages again
        await self._wait_for_sends()
        self._open_steps.clear()
        self._broken.clear()
        await self.store.wait_for_an_answer()
        await self.intake.open()

    async def _wait_for_sends(self) -> None:
        while self._sending:
            await asyncio.wait(self._sending)

    def _forward(self, failed: list[FailedChange]) -> None:
        """Forwards failed changes in the background. Their messages are acknowledged only after the task has ended."""
        messages: list[Delivery] = list({failed_change.message: None for failed_change in failed})  # type: ignore[misc]
        self._open_steps.update(messages)
        task = asyncio.create_task(self._send(failed, messages), name=f"failed-{self.lane}")
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _send(self, failed: list[FailedChange], messages: list[Delivery]) -> None:
        def ours() -> bool:
            return any(delivery.channel_open for delivery in messages)

        try:
            if retries := await self._ladder.send(failed, self.lane, ours=ours):
                await self.store.note_retries(retries)
            await self._finish_step(messages)
        except Exception as error:
            log.exception("failed_changes_not_sent", lane=self.lane, changes=len(failed), error=describe(error))
            self._broken.set()

    def _report_dead(self, written: Written) -> None:
        """Counts and logs the dead letters that were stored with a batch."""
        for reason, count in Counter(dead_letter.reason for dead_letter in written.new).items():
            self._metrics.dead_letters.inc(reason, count)
        for (reason, error), count in Counter(
            (failed_change.failure.reason, failed_change.failure.error) for failed_change in written.dead
        ).items():
            self._metrics.dead.inc(reason, count)
            if len(written.dead) > _MAX_FAILURES_LOGGED_ALONE:
                log.warning("changes_failed", queue=dead_queue(self.lane), reason=reason, error=error, changes=count)
        if len(written.dead) <= _MAX_FAILURES_LOGGED_ALONE:
            for failed_change in written.dead:
                log_failed(failed_change, dead_queue(self.lane), headers_for(failed_change, self.lane))

    async def _finish_step(self, deliveries: list[Delivery]) -> None:
        """Finishes one step of each message, and acknowledges each message that has no open step left."""
        ready = []
        for delivery in deliveries:
            self._open_steps[delivery] -= 1
            if self._open_steps[delivery] <= 0:
                del self._open_steps[delivery]
                ready.append(delivery)
        if ready:
            # Settle one group at a time: an acknowledgement may cover earlier messages, and the broker closes the
            # channel if one of them is acknowledged again.
            async with self._settling:
                await self.intake.settle(ready)

    async def _handle(self, taken: list[Delivery]) -> None:
        began = time.time_ns()
        batch = parse_batch(self.lane, taken)
        self._open_steps.update(taken)
        written = await self.store.write(batch)
        ended = time.time_ns()
        refused, failed = written.failed, [*batch.failed, *written.failed]
        if written.unsent:
            self._forward(written.unsent)
        await self._finish_step(taken)
        if written.dead:
            self._report_dead(written)

        refused_ids = {failed_change.change.id for failed_change in refused if failed_change.change}
        committed_changes = (
            [change for change in batch.changes if change.decoded.change.id not in refused_ids]
            if refused_ids
            else batch.changes
        )
        self._measure(batch, ended, (ended - began) / 1e9)
        trace_batch(self._tracer, batch, len(taken), committed_changes, failed, began, ended)
        self.written += len(committed_changes)
        self.failed += len(failed)
        self.last_batch, self.last_commit_at = len(batch.changes), now()
        for heartbeat in batch.heartbeats:
            self._watch.stored(self.lane, heartbeat.id, heartbeat.time, self.last_commit_at)
        self._committed()

    def _measure(self, batch: WriteBatch, ended: int, seconds: float) -> None:
        if not batch.changes:
            return
        self._metrics.batch.observe(len(batch.changes))
        self._metrics.write_seconds.observe(seconds)
        for change in batch.changes:
            self._metrics.lag.observe(max(0.0, ended / 1e9 - change.decoded.change.time.timestamp()))


class PostgresWriter:
    def __init__(
        self,
        settings: Settings,
        postgres: Postgres,
        publisher: Publisher,
        watch: HeartbeatMonitor,
        tracer: Tracer,
        metrics: WriterMetrics,
        *,
        committed: Callable[[], None] = lambda: None,
    ) -> None:
        """`committed`: called after each batch, when its changes are committed or forwarded."""
        prefetch = {lane: LanePrefetch(settings.lane_prefetch) for lane in Lane}
        self._batchers = [
            Batcher(settings, lane, postgres, publisher, watch, committed, tracer, metrics, prefetch[lane])
            for lane in Lane
            for _ in range(settings.lane_consumers)
        ]
        for lane in Lane:
            watch.watch_lane(lane, lambda lane=lane: self._idle(lane))  # type: ignore[misc]

    async def start(self) -> None:
        """Starts the consumers and returns at once. They subscribe as soon as the broker answers."""
        for batcher in self._batchers:
            batcher.loop.start()

    async def stop(self) -> None:
        """Stops within 10 seconds. The writer cannot be started again."""
        await asyncio.gather(*(batcher.intake.end() for batcher in self._batchers))
        await asyncio.gather(*(batcher.loop.stop(grace_seconds=_SHUTDOWN_GRACE_SECONDS) for batcher in self._batchers))
        await asyncio.gather(*(batcher.intake.close() for batcher in self._batchers))

    @property
    def held(self) -> int:
        """The number of messages that were delivered and are not acknowledged."""
        return sum(batcher.intake.held for batcher in self._batchers)

    @property
    def holding(self) -> bool:
        return any(batcher.store.holding_since is not None for batcher in self._batchers)

    def state(self) -> dict[str, Any]:
        """Returns the state for the health endpoint. `holding_since` is set while PostgreSQL is unavailable."""
        holds = [batcher.store.holding_since for batcher in self._batchers if batcher.store.holding_since]
        commits = [batcher.last_commit_at for batcher in self._batchers if batcher.last_commit_at]
        return {
            "consumers": {lane.value: sum(each.intake.active for each in self._of(lane)) for lane in Lane},
            "held_messages": {lane.value: sum(each.intake.held for each in self._of(lane)) for lane in Lane},
            "prefetch": {lane.value: [each.intake.prefetch for each in self._of(lane)] for lane in Lane},
            "held_bytes": {lane.value: sum(each.intake.held_bytes for each in self._of(lane)) for lane in Lane},
            "most_deliveries": max(batcher.intake.most_deliveries for batcher in self._batchers),
            "holding_since": min(holds, default=None),
            "last_commit_at": max(commits, default=None),
            "last_batch": max((each.last_batch for each in self._batchers), default=0),
            "written": sum(batcher.written for batcher in self._batchers),
            "failed": sum(batcher.failed for batcher in self._batchers),
        }

    def _of(self, lane: Lane) -> list[Batcher]:
        return [batcher for batcher in self._batchers if batcher.lane is lane]

    def _idle(self, lane: Lane) -> bool:
        return all(batcher.intake.active and not batcher.intake.held for batcher in self._of(lane))
