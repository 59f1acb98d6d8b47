"""A short run of `make chaos`, and a test that its proof can fail."""

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import pytest

from tests.chaos.load import Load
from tests.chaos.proof import judge
from tests.chaos.rest import restless
from tests.chaos.rig import Rig
from tests.chaos.run import run, show
from tests.chaos.schedule import Kind, schedule
from tests.chaos.seen import look
from tests.rigs.servers import Servers
from tests.rigs.servers.processes import with_own_redis
from tests.rigs.system import SERVICES, eventually

pytestmark = pytest.mark.timeout(300)

SEED, SECONDS = 4458, 20.0
SHOWN = 50
"""The ledger's screen names so many at most; its JSON, which the proof reads, names all."""
# Sessions that wait to insert into `changes`: a batch of the worker.
_HELD_UP = """
select a.pid from pg_locks l join pg_stat_activity a using (pid)
where l.database = (select oid from pg_database where datname = current_database())
    and l.relation = 'changes'::regclass and l.mode = 'RowExclusiveLock' and not l.granted
"""


@pytest.fixture(scope="module")
async def rig(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rig]:
    """One for both, in this order: after the second nothing adds up in it any more. Nothing heals what is lost before
    it is found."""
    folder = tmp_path_factory.mktemp("chaos")
    rig = Rig(with_own_redis(servers, folder), folder, lost_message_seconds=3_600)
    await asyncio.to_thread(rig.servers.redis.start)
    try:
        await rig.up()
        yield rig
    finally:
        await rig.down()
        await asyncio.to_thread(servers.rabbitmq.delete_vhost, rig.system.name)
        await asyncio.to_thread(servers.postgres.drop_database, rig.system.name)
        await asyncio.to_thread(rig.servers.redis.discard)


async def test_faults_at_random_times_lose_and_double_nothing(rig: Rig) -> None:
    faults = schedule(SEED, SECONDS)
    assert {(one.kind, one.target) for one in faults} >= {
        (Kind.KILL, "worker"),
        (Kind.KILL, "orders"),
        (Kind.FREEZE, "postgres"),
        (Kind.LOSE, "postgres"),
        (Kind.WIPE, "redis"),
        (Kind.DISK_FULL, "rabbitmq"),
    }
    proof = await run(rig, SEED, faults, SECONDS, clients=4)
    show(proof, SEED, len(faults))
    assert proof.holds
    assert proof.acknowledged > 50
    assert proof.pushed > 0


async def test_a_worker_that_acknowledges_before_it_commits_loses_changes_and_they_are_named(
    rig: Rig, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    await rig.system.stop("worker")
    monkeypatch.setitem(SERVICES, "worker", ["tests.chaos.broken_worker"])
    # A long timeout: the worker is to be killed while it waits for a lock, however long that takes.
    rig.system.env |= {"TICKETRAIL_DATABASE_TIMEOUT_SECONDS": "60"}
    rig.system.start("worker")
    await rig.system.ready("worker")
    load = Load(rig, SEED, clients=2)
    load.start()
    try:
        for _ in range(3):
            await kill_the_worker_before_it_commits(rig, servers)
    finally:
        await load.stop()

    async def still_moving() -> dict[str, int]:
        found = await restless(rig)
        return {name: count for name, count in found.items() if name != "pending"}  # what is lost stays pending

    await eventually(still_moving, within=60, what="rest", until=lambda found: not found)
    (code, told, _), seen = await asyncio.gather(rig.system.command("ledger", "--all"), look(rig))
    stored = {one.change for one in seen.changes}
    lost = {one.change: one for one in seen.logged if one.change not in stored}
    assert lost
    assert set(seen.unexplained) == set(lost)
    assert code == 1
    named = [one for one in lost.values() if f"change {one.change} of order/{one.order}" in told]
    assert len(named) == min(len(lost), SHOWN), told
    assert all(one.trace is not None and one.trace in told for one in named), told
    proof = judge(load.acknowledged, load.refused, load.unknown, seen)
    assert not proof.holds
    # Changes that were never acknowledged may be lost too; the proof names every acknowledged one.
    assert proof.lost
    assert all(any(change in line for change in lost) or line.startswith("payment ") for line in proof.lost)


async def kill_the_worker_before_it_commits(rig: Rig, servers: Servers) -> None:
    """Kills the worker by kill -9 while its batch waits for a lock on `changes`, and ends the batch's transaction."""
    address = servers.postgres.superuser_url.rpartition("/")[0]
    locker, watcher = [await asyncpg.connect(f"{address}/{rig.system.name}") for _ in range(2)]

    async def held_up() -> list[int]:
        return [row["pid"] for row in await watcher.fetch(_HELD_UP)]

    try:
        async with locker.transaction():
            await locker.execute("lock table changes in access exclusive mode")
            await eventually(held_up, what="a batch that waits")
            await asyncio.to_thread(rig.system.children["worker"].kill)
            for pid in await held_up():
                await watcher.execute("select pg_terminate_backend($1)", pid)
            await eventually(held_up, what="none that waits", until=lambda pids: not pids)
    finally:
        await locker.close()
        await watcher.close()
    rig.system.start("worker")
    await rig.system.ready("worker")
