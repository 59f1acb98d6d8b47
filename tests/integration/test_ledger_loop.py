"""The ledger loop on real servers: it brings back what PostgreSQL, a lane or the log has lost."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from urllib.parse import quote

import aio_pika
import asyncpg
import pytest

from services.sync.ledger.ledger_loop import LEADER_LOCK, LedgerLoop
from services.sync.ledger.session import Patience
from services.sync.maintenance.reconciler import Reconciler
from shared.entities.contract import Change, Lane, encode, now
from shared.entities.order import OrderStatus
from shared.messaging import declare, topology
from shared.messaging.log import LogReader
from shared.messaging.log_tap import LogTap
from shared.messaging.management import ask
from shared.mirror.mirror import Document
from shared.mirror.stored_heads import FeedNote
from shared.postgres.checkpoints import last_checkpoint
from shared.postgres.feed import find_end
from shared.postgres.pool import UNAVAILABLE
from tests.rigs.builders import RESTAURANT, change, message, order
from tests.rigs.mirror_writer import MirrorRig
from tests.rigs.postgres_writer import MakeRig, Rig
from tests.rigs.rail.changes import applied
from tests.rigs.servers import Redis, Servers
from tests.rigs.system import eventually

QUICK = Patience(look_up=0.2, missing_in_log=0.5, resend=1.0)


@pytest.fixture(scope="module")
def redis(servers: Servers) -> Redis:
    """A Redis for this module only, because a mirror keeps the position of one feed."""
    return servers.extra_redis()


class LedgerRig:
    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.ledger = self.another()

    def another(self, tap: LogTap | None = None) -> LedgerLoop:
        return LedgerLoop(self.rig.settings, self.rig.postgres, self.rig.publisher, tap=tap, patience=QUICK)

    async def leads(self, ledger: LedgerLoop | None = None) -> None:
        async def look() -> bool:
            return bool((ledger or self.ledger).state()["leads"])

        await eventually(look, what="a leader", within=30)

    async def compared(self) -> None:
        """Waits for a checkpoint behind everything that was written until now."""
        end = await find_end(self.rig.database)

        async def look() -> bool:
            found = await last_checkpoint(self.rig.database)
            return found is not None and (found.feed_xid, found.feed_seq) >= (end.xid, end.seq)

        await eventually(look, what="a checkpoint behind the last commit", within=30)

    async def delete(self, *changes: Change) -> None:
        """Deletes the commits and all later checkpoints from PostgreSQL, and ends all connections, as a failover to a
        standby without them does."""
        first = await self.rig.database.fetchval(
            "select min(xid::text::int8) from changes where change_id = any($1::uuid[])", [one.id for one in changes]
        )
        await self.rig.as_owner(f"delete from checkpoints where xid::text::int8 > {first}")
        ids = ", ".join(f"'{one.entity_id}'" for one in changes)
        tables = (("changes", "entity_id"), ("orders", "id"), ("order_items", "order_id"))
        await self.rig.as_owner(
            "; ".join(
                f"alter table {table} no force row level security; delete from {table} where {column} in ({ids});"
                f" alter table {table} force row level security"
                for table, column in tables
            )
        )
        name = self.rig.settings.database_url.rpartition("/")[2]
        superuser = await asyncpg.connect(self.rig.settings.database_writer_url)
        await superuser.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where datname = $1 and pid <> pg_backend_pid()",
            name,
        )
        await superuser.close()
        self.rig.database = await asyncpg.connect(self.rig.settings.database_writer_url)

        async def answers() -> bool:
            try:
                async with self.rig.postgres.connection() as connection:
                    return bool(await connection.fetchval("select true"))
            except UNAVAILABLE:
                return False

        await eventually(answers, what="PostgreSQL behind the breaker")


@pytest.fixture
async def rigged(make_rig: MakeRig, redis: Redis) -> AsyncIterator[LedgerRig]:
    await redis.command("FLUSHALL")
    rig: Rig = await make_rig(redis_url=redis.url, mirror_settle_seconds=0.1)
    end = await find_end(rig.database)
    await rig.mirror.keep_restaurant(RESTAURANT, b"{}")
    await rig.mirror.settle([], note=FeedNote(end.xid, end.encode()))
    made = LedgerRig(rig)
    await rig.writer.start()
    await rig.heartbeats.start()
    rig.feed_loop.start()
    made.ledger.start()
    await made.leads()
    yield made
    await made.ledger.stop()


async def document(rig: Rig, made: Change) -> Document | None:
    _, [found] = await rig.mirror.read(RESTAURANT, made.entity, [made.entity_id])
    return found


async def synced(rig: Rig, made: Change) -> None:
    await eventually(
        lambda: document(rig, made),
        what="the state `synced`",
        until=lambda found: found is not None and found.head == made.head and not found.pending,
        within=60,
    )


async def test_commits_deleted_behind_a_settled_mirror_are_restored_and_never_trimmed(rigged: LedgerRig) -> None:
    rig = rigged.rig
    at = now() - timedelta(days=30)
    lost = change(order(status=OrderStatus.COMPLETED, created_at=at, updated_at=at))
    await rig.mirror.apply([applied(lost)])
    await rig.publish(lost)
    await rig.written(lost)
    await synced(rig, lost)
    await rigged.compared()
    await rig.feed_loop.stop()  # so that only the reconciler can keep the document
    await rigged.ledger.stop()
    await rigged.delete(lost)
    nothing: Any = None
    rail: Any = type("NoRail", (), {"claim_finisher": nothing})
    reconciler = Reconciler(rig.settings, rig.postgres, rig.mirror, rail, rigged.ledger)
    assert await reconciler.trim() == 0
    assert await document(rig, lost) is not None
    rigged.ledger.start()
    await rig.written(lost, within=60)
    assert rigged.ledger.totals.resent >= 1
    rig.feed_loop.start()
    await synced(rig, lost)


async def test_change_that_a_purged_lane_lost_is_sent_again(rigged: LedgerRig, servers: Servers) -> None:
    rig = rigged.rig
    await rig.writer.stop()
    lost = change(order())
    await rig.publish(lost)
    queue = topology.lane_queue(Lane.CRITICAL)
    await eventually(lambda: rig.depth(queue), what="the change in its lane", until=lambda depth: depth >= 1)
    vhost = rig.settings.rabbitmq_url.rpartition("/")[2]
    await asyncio.to_thread(
        ask, servers.rabbitmq.management_url, "DELETE", f"/api/queues/{quote(vhost)}/{queue}/contents"
    )
    rig.writer = type(rig.writer)(
        rig.settings, rig.postgres, rig.publisher, rig.watch, rig.tracer, rig.counts, committed=rig.feed_loop.wake
    )
    await rig.writer.start()
    await rig.written(lost, within=60)
    assert rigged.ledger.totals.resent == 1
    await rigged.compared()
    await rigged.ledger.stop()
    second = rigged.another()
    second.start()
    try:
        await rigged.leads(second)
        assert second.totals.resent == 1, "the next leader does not know what the last one has repaired"
    finally:
        await second.stop()


async def test_leader_compares_the_log_that_the_mirror_writer_reads_and_reads_on_without_it(rigged: LedgerRig) -> None:
    rig = rigged.rig
    await rigged.ledger.stop()
    tap = LogTap()
    mirror_writer = MirrorRig(rig, tap=tap).writer
    mirror_writer.start()
    leader = rigged.another(tap)
    leader.start()

    async def shares(expected: bool) -> None:
        async def look() -> bool:
            return leader.state()["shares_log"] is expected

        await eventually(look, what=f"a leader with shares_log {expected}", within=30)

    try:
        for mirror_writer_runs in (True, False):
            if not mirror_writer_runs:
                await mirror_writer.stop()
            await shares(mirror_writer_runs)
            lost = change(order())
            await rig.publisher.publish_to_queue(topology.LOG, message(lost))
            await rig.written(lost, within=60)
        assert leader.totals.resent == 2
    finally:
        await leader.stop()
        await mirror_writer.stop()


async def test_ledger_without_a_leader_raises_an_alarm(rigged: LedgerRig) -> None:
    await rigged.compared()
    assert rigged.ledger.state()["alarms"] == []
    await rigged.ledger.stop()
    async with rigged.rig.postgres.connection() as connection:
        await connection.execute("select pg_advisory_lock($1)", LEADER_LOCK)  # no worker can lead
        await rigged.rig.as_owner("update checkpoints set at = at - interval '6 minutes'")
        follower = rigged.another()
        follower.start()
        try:

            async def alarms() -> list[str]:
                return list(follower.state()["alarms"])

            await eventually(alarms, what="the alarm", until=lambda found: found == ["age"])
            await connection.execute("select pg_advisory_unlock($1)", LEADER_LOCK)
            await eventually(alarms, within=30, what="no alarm", until=lambda found: not found)
        finally:
            await follower.stop()


async def test_log_that_was_created_again_gets_the_changes_of_postgres(rigged: LedgerRig) -> None:
    rig = rigged.rig
    expired = change(order())
    await rig.publish(expired)
    await rig.written(expired)
    await rigged.compared()
    # Checkpoints expire with the entries of the log.
    await rig.as_owner("delete from checkpoints where xid <> (select xid from checkpoints order by xid desc limit 1)")
    kept = [change(order()) for _ in range(3)]
    await rig.publish(*kept)
    await rig.written(*kept)
    await rigged.compared()
    async with rig.channel() as channel:
        await channel.queue_delete(topology.LOG)
    connection = await aio_pika.connect(rig.settings.rabbitmq_url)
    async with connection:
        await declare.declare_logs(connection, rig.settings)
    found: set[str] = set()
    reader = LogReader(rig.settings.rabbitmq_url, name="test", idle_seconds=5.0)

    async def read() -> None:
        async for batch in reader.read("first"):
            found.update(
                one.id for one in (expired, *kept) for entry in batch.entries if encode(one)[:60] in entry.body
            )

    reading = asyncio.create_task(read())

    async def all_found() -> bool:
        return found >= {one.id for one in kept}

    await eventually(all_found, what="the changes in the new log", within=60)
    await rigged.compared()
    assert expired.id not in found
    reading.cancel()


async def test_second_ledger_waits_and_takes_over(rigged: LedgerRig) -> None:
    second = rigged.another()
    second.start()
    try:
        made = change(order())
        await rigged.rig.publish(made)
        await rigged.rig.written(made)
        await rigged.compared()
        assert not second.state()["leads"]
        await rigged.ledger.stop()
        await rigged.leads(second)
        later = change(order())
        await rigged.rig.publish(later)
        await rigged.rig.written(later)
        await rigged.compared()
        assert second.totals.resent == second.totals.republished == 0
    finally:
        await second.stop()


async def test_checkpoint_of_another_leader_ends_the_session(rigged: LedgerRig) -> None:
    await rigged.rig.database.execute(
        "insert into checkpoints (log_low, log_low_crc, log_at, log_at_crc, feed_xid, feed_seq)"
        " values (-1, 0, -1, 0, '0', 0)"
    )
    made = change(order())
    await rigged.rig.publish(made)
    await rigged.rig.written(made)
    await rigged.compared()
