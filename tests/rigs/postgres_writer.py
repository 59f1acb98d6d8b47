"""The parts of a sync worker in this process, with a database and a vhost of their own."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aio_pika
import asyncpg
from aio_pika.abc import AbstractIncomingMessage

from services.sync.dead_letters import store as dead_letter_store
from services.sync.dead_letters.collector import DeadLetterCollector
from services.sync.dead_letters.replay_worker import Replays
from services.sync.dead_letters.store import DeadLetter, DeadLetterQuery, FullDeadLetter
from services.sync.heartbeat import HeartbeatMonitor, HeartbeatSender
from services.sync.mirror.feed_loop import FeedLoop
from services.sync.mirror.mirror_writer import MirrorWriter
from services.sync.writer.postgres_writer import PostgresWriter
from shared.entities.contract import Change, Lane
from shared.messaging import topology
from shared.messaging.publisher import Publisher
from shared.observability.metrics import Metrics, WriterMetrics
from shared.observability.tracing import Tracer
from shared.postgres.pool import Postgres
from shared.rail.assemble import assemble_rail, mirror_of, publisher_of
from shared.settings import Settings
from tests.rigs.builders import message
from tests.rigs.system import eventually


class Rig:
    """The parts of a sync worker; the test starts those that it needs."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.postgres = Postgres(settings.database_writer_url, settings)
        self.mirror, self.publisher = mirror_of(settings), publisher_of(settings)
        self.watch = HeartbeatMonitor(settings)
        self.heartbeats = HeartbeatSender(settings, self.postgres, self.publisher, self.watch)
        self.tracer = Tracer("test", settings)
        self.metrics = Metrics()
        self.counts = WriterMetrics(self.metrics)
        self.feed_loop = FeedLoop(settings, self.postgres, self.mirror)
        self.writer = PostgresWriter(
            settings, self.postgres, self.publisher, self.watch, self.tracer, self.counts, committed=self.feed_loop.wake
        )
        self.mirror_writer = MirrorWriter(
            settings, self.postgres, self.mirror, self.publisher, self.watch, self.tracer, WriterMetrics(Metrics())
        )
        """It is not started: the replay worker uses it to apply single changes."""
        self.collector = DeadLetterCollector(
            settings, self.postgres, self.counts, check_consumers_delay_seconds=0.3, renew_delay_seconds=3.0
        )
        self.replays = self.another_replay_worker()
        self.database: Any = None
        """A connection of the writer role, which sees every tenant. Row-level security is forced, so the owner sees
        none."""

    async def up(self) -> None:
        self.database = await asyncpg.connect(self.settings.database_writer_url)
        await self.publisher.start(wait=10)

    async def down(self) -> None:
        await self.replays.stop()
        await self.feed_loop.stop()
        await self.heartbeats.stop()
        await self.writer.stop()
        await self.collector.stop()
        await self.publisher.stop()
        await self.mirror.close()
        await self.postgres.close()
        if self.database is not None:
            await self.database.close()

    def another_replay_worker(self, *, publisher: Publisher | None = None, **settings: Any) -> Replays:
        """Returns another replay worker."""
        chosen = {"poll": 0.02, "silent_seconds": 5.0, "slack_seconds": 30.0, **settings}
        publisher = publisher or self.publisher
        rail = assemble_rail(self.settings, mirror=self.mirror, publisher=self.publisher).rail
        return Replays(self.settings, self.postgres, self.mirror_writer, publisher, self.mirror, rail, **chosen)

    async def dead_letters(self, count: int, *, within: float = 20.0, **filters: Any) -> list[FullDeadLetter]:
        """Waits until there are `count` dead letters; returns them, oldest first."""

        async def look() -> list[DeadLetter]:
            return await dead_letter_store.page(self.database, DeadLetterQuery(**filters), limit=1_000)

        found = await eventually(
            look, within=within, what=f"{count} dead letters", until=lambda seen: len(seen) >= count
        )
        whole = [await dead_letter_store.one(self.database, one.id) for one in reversed(found)]
        return [one for one in whole if one is not None]

    async def as_owner(self, sql: str) -> None:
        owner = await asyncpg.connect(self.settings.database_url)
        await owner.execute(sql)
        await owner.close()

    async def publish(self, *changes: Change | bytes, lane: Lane = Lane.CRITICAL) -> None:
        await self.publisher.publish(lane.value, message(*changes))

    async def count(self, table: str) -> int:
        return int(await self.database.fetchval(f"select count(*) from {table}"))

    async def written(self, *changes: Change, within: float = 20.0) -> None:
        """Waits until all changes are in the table `changes`."""
        ids = [one.id for one in changes]

        async def look() -> int:
            return int(
                await self.database.fetchval("select count(*) from changes where change_id = any($1::uuid[])", ids)
            )

        await eventually(
            look, within=within, what="every change in PostgreSQL", until=lambda found: found == len(set(ids))
        )

    async def failed(self, count: int, *, within: float = 20.0) -> None:
        async def look() -> int:
            return int(self.writer.state()["failed"])

        await eventually(look, within=within, what=f"{count} failed changes", until=lambda found: found >= count)

    async def drained(self, *, within: float = 20.0) -> None:
        """Waits until the lanes and the retry queues are empty and the writer holds nothing."""
        names = [queue.name for queue in topology.queues(self.settings) if "dead" not in queue.name]

        async def look() -> dict[str, int]:
            return {name: depth for name in names if (depth := await self.depth(name))}

        await eventually(
            look, within=within, what="empty lanes and retry queues", until=lambda left: not left and not self.held()
        )

    async def all_acknowledged(self) -> None:
        """Asserts that every message is acknowledged: waits until the queues are empty, then stops the writer. A
        message without an acknowledgement would return to its queue."""
        await self.drained()
        await self.writer.stop()
        left = {lane: await self.depth(topology.lane_queue(lane)) for lane in Lane}
        assert not any(left.values()), f"not acknowledged: {left}"

    def counted(self, metric: str) -> float:
        """Returns the value of a metric as /metrics shows it, by name and labels; 0 if it is missing."""
        lines = [line for line in self.metrics.text().decode().splitlines() if line.startswith(f"{metric} ")]
        return float(lines[0].rpartition(" ")[2]) if lines else 0.0

    async def metric_becomes(self, metric: str, value: float) -> None:
        """Waits until a metric has this value. A metric is updated a moment after the rows that it counts."""

        async def look() -> float:
            return self.counted(metric)

        await eventually(look, what=f"{value} in {metric}", until=lambda found: found == value)

    def held(self) -> int:
        return sum(self.writer.state()["held_messages"].values())

    async def depth(self, queue: str) -> int:
        # The channel is new, because a robust or used one answers from its cache.
        async with self.channel() as channel:
            return (await channel.declare_queue(queue, passive=True)).declaration_result.message_count or 0

    async def dead(self, lane: Lane = Lane.CRITICAL, *, count: int = 1) -> list[AbstractIncomingMessage]:
        """Waits until the dead-letter queue holds `count` messages, and takes them."""
        name = topology.dead_queue(lane)
        await eventually(lambda: self.depth(name), what=f"{count} in {name}", until=lambda n: n >= count)
        async with self.channel() as channel:
            queue = await channel.get_queue(name)
            found = [await queue.get(timeout=5) for _ in range(count)]
            for one in found:
                await one.ack()
            return found

    @asynccontextmanager
    async def channel(self) -> AsyncIterator[Any]:
        connection = await aio_pika.connect(self.settings.rabbitmq_url, timeout=10)
        try:
            yield await connection.channel()
        finally:
            await connection.close()


MakeRig = Callable[..., Any]
"""Takes the settings that differ from the defaults of the tests, as keyword arguments."""
