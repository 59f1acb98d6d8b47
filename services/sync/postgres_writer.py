"""The PostgreSQL writer: what waits in the lanes comes into the tables, in batches.

Guarantee: a message is acknowledged only when every change in it is committed, or the broker has confirmed it on a
retry queue or in the dead queue. One that is acknowledged too late comes again, and writing it again changes nothing.
Order is not kept and does not matter: several consumers share each lane, and the guard decides which state stands.

    take ─► sort out ─► write ─► send on what failed ─► acknowledge ─► tell the mirror

PostgreSQL away: batches are held (`store`), and the prefetch bounds what waits here. After `sink_away_seconds` the
consumers let go of their messages, and subscribe again when it answers. RabbitMQ away: connections are renewed
(`intake`). The mirror away: nobody waits for it (`settlement`).

At shutdown: no new deliveries, what was taken is finished and settled, within 10 seconds. What could not be finished,
because PostgreSQL is away for instance, goes back to its queue.
"""

import asyncio
import time
from datetime import datetime
from typing import Any

import structlog

from services.sync.batch_spans import trace_batch
from services.sync.batches import Batch, sort_out
from services.sync.fences import FenceWatch
from services.sync.intake import Delivery, Intake
from services.sync.retry import Ladder
from services.sync.settlement import Settled, Settlement
from services.sync.store import SinkGone, Store
from shared.entities.contract import Lane, now
from shared.lifecycle import vital_task
from shared.messaging.publisher import Publisher
from shared.metrics import WriterMetrics
from shared.mirror.mirror import Mirror
from shared.postgres.pool import Postgres
from shared.settings import Settings
from shared.tracing import Tracer

log = structlog.get_logger(__name__)

_FINISH_WITHIN = 6.5  # of the 10 seconds that a stop may take; closing has its own bounds


class Batcher:
    """One consumer of one lane, with its channel, its batches and its hold."""

    def __init__(
        self,
        settings: Settings,
        lane: Lane,
        postgres: Postgres,
        publisher: Publisher,
        watch: FenceWatch,
        settlement: Settlement,
        tracer: Tracer,
        metrics: WriterMetrics,
    ) -> None:
        self.lane = lane
        self._metrics = metrics
        self._tracer = tracer
        self.intake = Intake(settings, lane, watch)
        self.store = Store(postgres, settings)
        self._ladder = Ladder(publisher, settings.retry_steps_ms, metrics)
        self._watch = watch
        self._settlement = settlement
        self.written = 0
        self.failed = 0
        self.last_batch = 0
        self.last_commit_at: datetime | None = None

    async def run(self) -> None:
        """Returns after `intake.end`, when everything that was taken is settled."""
        await self.intake.open()
        while taken := await self.intake.take():
            try:
                await self._handle(taken)
                continue
            except SinkGone as error:
                log.warning("lane_let_go", lane=self.lane, error=str(error))
            except Exception:
                # A bug of ours outside the writing of a change. The messages come again; if that does not help, the
                # delivery limit takes them to the dead queue.
                log.exception("batch_failed", lane=self.lane, messages=len(taken))
            await self.intake.close()
            await self.store.wait_for_an_answer()
            await self.intake.open()

    async def _handle(self, taken: list[Delivery]) -> None:
        began = time.time_ns()
        batch = sort_out(self.lane, taken)
        refused = await self.store.write(batch)
        ended = time.time_ns()
        failed = [*batch.failed, *refused]
        if failed:

            def ours() -> bool:
                return any(delivery.ours for delivery in taken)

            await asyncio.gather(*(self._ladder.send(one, self.lane, ours=ours) for one in failed))
        await self.intake.settle(taken)

        lost = {one.change.id for one in refused if one.change}
        through = [one for one in batch.changes if one.written.change.id not in lost] if lost else batch.changes
        committed = [one.written for one in through]
        self._measure(batch, ended, (ended - began) / 1e9)
        trace_batch(self._tracer, batch, len(taken), through, failed, began, ended)
        self.written += len(committed)
        self.failed += len(failed)
        self.last_batch, self.last_commit_at = len(batch.changes), now()
        fenced_at = max((fence.time for fence in batch.fences), default=None)
        if fenced_at is not None:
            self._watch.note(self.lane, fenced_at, self.last_commit_at)
        self._settlement.tell(Settled(committed, failed, {self.lane: fenced_at} if fenced_at else {}))

    def _measure(self, batch: Batch, ended: int, seconds: float) -> None:
        if not batch.changes:
            return
        self._metrics.batch.observe(len(batch.changes))
        self._metrics.write_seconds.observe(seconds)
        for one in batch.changes:
            self._metrics.lag.observe(max(0.0, ended / 1e9 - one.written.change.time.timestamp()))


class PostgresWriter:
    def __init__(
        self,
        settings: Settings,
        postgres: Postgres,
        mirror: Mirror,
        publisher: Publisher,
        watch: FenceWatch,
        tracer: Tracer,
        metrics: WriterMetrics,
    ) -> None:
        self._settlement = Settlement(mirror)
        self._batchers = [
            Batcher(settings, lane, postgres, publisher, watch, self._settlement, tracer, metrics)
            for lane in Lane
            for _ in range(settings.lane_consumers)
        ]
        for lane in Lane:
            watch.watch_lane(lane, lambda lane=lane: self._idle(lane))  # type: ignore[misc]
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Returns at once; the consumers subscribe as soon as the broker is there."""
        if not self._tasks:
            self._settlement.start()
            self._tasks = [
                vital_task(batcher.run(), name=f"postgres-writer-{batcher.lane}") for batcher in self._batchers
            ]

    async def stop(self) -> None:
        """Within 10 seconds. May be called twice, and without a start; it is not started again."""
        tasks, self._tasks = self._tasks, []
        if not tasks:
            return
        await asyncio.gather(*(batcher.intake.end() for batcher in self._batchers))
        _, unfinished = await asyncio.wait(tasks, timeout=_FINISH_WITHIN)
        for task in unfinished:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                log.error("postgres_writer_broke", error=repr(result))
        await asyncio.gather(*(batcher.intake.close() for batcher in self._batchers), self._settlement.stop())

    @property
    def held(self) -> int:
        """Messages that were delivered and are not settled."""
        return sum(batcher.intake.held for batcher in self._batchers)

    @property
    def holding(self) -> bool:
        return any(batcher.store.holding_since is not None for batcher in self._batchers)

    def state(self) -> dict[str, Any]:
        """For health: `holding_since` is set while PostgreSQL is away."""
        holds = [batcher.store.holding_since for batcher in self._batchers if batcher.store.holding_since]
        commits = [batcher.last_commit_at for batcher in self._batchers if batcher.last_commit_at]
        return {
            "consumers": {lane.value: sum(each.intake.active for each in self._of(lane)) for lane in Lane},
            "held_messages": {lane.value: sum(each.intake.held for each in self._of(lane)) for lane in Lane},
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
