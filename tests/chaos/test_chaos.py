"""A short run of `make chaos`, and a test that its proof can fail."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from tests.chaos.idle import unfinished_work
from tests.chaos.load import Load
from tests.chaos.proof import check_answers
from tests.chaos.rig import ChaosRig
from tests.chaos.run import run, show
from tests.chaos.schedule import RARE, Fault, Kind, schedule
from tests.chaos.stores import read_stores
from tests.rigs.servers import Servers
from tests.rigs.servers.processes import prepare, with_own_redis
from tests.rigs.system import SERVICES, eventually

pytestmark = pytest.mark.timeout(300)

SEED, SECONDS = 1963837, 20.0
MAX_PRINTED = 50
"""The ledger prints at most this many names; its JSON, which the proof reads, has all of them."""
# Sessions of a worker whose batch waits to insert into `changes`.
_SELECT_WAITING_SESSIONS = """
select a.pid from pg_locks l join pg_stat_activity a using (pid)
where l.database = (select oid from pg_database where datname = current_database())
    and l.relation = 'changes'::regclass and l.mode = 'RowExclusiveLock' and not l.granted
"""


@pytest.fixture
async def own(tmp_path: Path) -> AsyncIterator[ChaosRig]:
    """A system on servers of its own, local processes whose files a fault may put back."""
    servers = await asyncio.to_thread(prepare)
    rig = ChaosRig(servers, tmp_path)
    await asyncio.to_thread(servers.start_all)
    try:
        await rig.up()
        yield rig
    finally:
        await rig.down()
        await asyncio.to_thread(servers.stop_all)


@pytest.fixture(scope="module")
async def rig(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ChaosRig]:
    """One system for all tests. The order matters: the last test loses changes. The long
    `lost_message_seconds` keeps the reconciler from recording a lost change again before the test finds it."""
    folder = tmp_path_factory.mktemp("chaos")
    rig = ChaosRig(with_own_redis(servers, folder), folder, lost_message_seconds=3_600)
    await asyncio.to_thread(rig.servers.redis.start)
    try:
        await rig.up()
        yield rig
    finally:
        await rig.down()
        await asyncio.to_thread(servers.rabbitmq.delete_vhost, rig.system.name)
        await asyncio.to_thread(servers.postgres.drop_database, rig.system.name)
        await asyncio.to_thread(rig.servers.redis.discard)


async def test_faults_at_random_times_lose_and_double_nothing(rig: ChaosRig) -> None:
    faults = schedule(SEED, SECONDS, without=RARE)
    assert {(one.kind, one.target) for one in faults} >= {
        (Kind.KILL, "worker"),
        (Kind.KILL, "second-orders"),
        (Kind.FREEZE, "postgres"),
        (Kind.SLOW, "postgres"),
        (Kind.WIPE, "redis"),
        (Kind.HOST_FULL, "host"),
        (Kind.CLOCK, "orders"),
    }
    proof = await run(rig, SEED, faults, SECONDS, clients=4)
    show(proof, SEED, len(faults))
    assert proof.holds
    assert proof.acknowledged > 50
    assert proof.pushed > 0


@pytest.mark.slow  # it is a second run of the chaos load
async def test_two_releases_side_by_side_lose_and_double_nothing(rig: ChaosRig) -> None:
    if rig.previous is None:
        # A source archive and a shallow clone have no history, so the old release cannot run.
        pytest.skip("the history lacks the previous release")
    faults = [
        Fault(1.0, Kind.OLD_RELEASE, "second-orders", 14.0),
        Fault(2.0, Kind.OLD_RELEASE, "notifier", 8.0),
        Fault(4.0, Kind.OLD_RELEASE, "worker", 9.0),
        Fault(8.0, Kind.KILL, "orders", 1.0),
        Fault(12.0, Kind.OLD_RELEASE, "orders", 8.0),
        Fault(15.0, Kind.KILL, "worker", 1.0),
    ]
    proof = await run(rig, SEED, faults, 24.0, clients=4)
    show(proof, SEED, len(faults))
    assert proof.holds
    assert proof.acknowledged > 20


@pytest.mark.slow  # it is a second run of the chaos load
async def test_wrong_clocks_of_the_orders_services_and_the_worker_lose_and_double_nothing(rig: ChaosRig) -> None:
    faults = [
        Fault(2.0, Kind.CLOCK, "worker", 7.0, 2.0),
        Fault(4.0, Kind.CLOCK, "second-orders", 12.0, -2.0),
        Fault(9.5, Kind.KILL, "worker", 0.5),
        Fault(10.5, Kind.WIPE, "redis", 0.0),
        Fault(14.0, Kind.CLOCK, "worker", 6.0, -3.0),
        Fault(15.0, Kind.CLOCK, "orders", 5.0, 3.0),
    ]
    proof = await run(rig, SEED, faults, 22.0, clients=4)
    show(proof, SEED, len(faults))
    assert proof.holds
    assert proof.acknowledged > 20


@pytest.mark.slow  # it starts servers of its own, and waits for the ledger loop
@pytest.mark.parametrize(
    "faults",
    [
        pytest.param(
            [
                Fault(3.0, Kind.MIRROR_FAILOVER, "redis", 2.0),
                Fault(9.0, Kind.MIRROR_FAILBACK, "redis", 8.0),
                Fault(12.0, Kind.KILL, "worker", 1.0),
            ],
            id="mirror",
        ),
        pytest.param(
            [
                Fault(3.0, Kind.DATABASE_FAILOVER, "postgres", 3.0),
                Fault(14.0, Kind.DATABASE_FAILOVER, "postgres", 2.0),
                Fault(15.0, Kind.KILL, "worker", 1.0),
            ],
            id="database",
        ),
        pytest.param(
            [
                Fault(3.0, Kind.POWER_CUT, "machine", 3.0),
                Fault(4.0, Kind.KILL, "orders", 1.0),
                Fault(16.0, Kind.POWER_CUT, "machine", 2.0),
            ],
            id="power",
        ),
    ],
)
async def test_servers_that_lose_their_last_writes_lose_and_double_nothing(own: ChaosRig, faults: list[Fault]) -> None:
    proof = await run(own, SEED, faults, 24.0, clients=4)
    show(proof, SEED, len(faults))
    assert proof.holds
    assert proof.acknowledged > 20


@pytest.mark.slow  # it is a third run of the chaos load
async def test_proof_names_the_changes_lost_by_an_early_acknowledgement_and_the_ledger_restores_them(
    rig: ChaosRig, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    await rig.system.stop("worker")
    monkeypatch.setitem(SERVICES, "worker", ["tests.chaos.broken_worker"])
    # The timeout is long, because the worker must still wait for the lock when it is killed.
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

    async def work_left_besides_pending() -> dict[str, int]:
        found = await unfinished_work(rig)
        return {name: count for name, count in found.items() if name != "pending"}  # a lost change stays pending

    await eventually(work_left_besides_pending, within=60, what="no work left", until=lambda found: not found)
    (code, printed, _), contents = await asyncio.gather(rig.system.command("ledger", "--all"), read_stores(rig))
    stored = {one.change for one in contents.changes}
    lost = {one.change: one for one in contents.logged if one.change not in stored}
    assert lost
    assert set(contents.unexplained) == set(lost)
    assert code == 1
    named = [one for one in lost.values() if f"change {one.change} of order/{one.order}" in printed]
    assert len(named) == min(len(lost), MAX_PRINTED), printed
    assert all(one.trace is not None and one.trace in printed for one in named), printed
    proof = check_answers(load.acknowledged, load.refused, load.unknown, contents)
    assert not proof.holds
    # Changes that were never acknowledged may be lost too; the proof names every acknowledged one.
    assert proof.lost
    assert all(any(change in line for change in lost) or line.startswith("payment ") for line in proof.lost)

    await rig.system.stop("worker")
    monkeypatch.undo()
    rig.system.start("worker")
    await rig.system.ready("worker")

    async def healed() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(await rig.system.cli("ledger", "--all", "--json", check=False))
        return found

    # The leader reports the changes that it has sent again with its next checkpoint.
    report = await eventually(
        healed,
        within=90,
        what="every lost change in PostgreSQL, sent again by the leader",
        until=lambda found: not found["unexplained"] and found["leader"]["resent"] > 0,
    )
    assert report["accepted"] == report["synced"]
    assert {one.change for one in (await read_stores(rig)).changes} >= set(lost)


async def kill_the_worker_before_it_commits(rig: ChaosRig, servers: Servers) -> None:
    """Kills the worker by kill -9 while its batch waits for a lock on `changes`, and ends the batch's transaction."""
    address = servers.postgres.superuser_url.rpartition("/")[0]
    locker, watcher = [await asyncpg.connect(f"{address}/{rig.system.name}") for _ in range(2)]

    async def waiting_sessions() -> list[int]:
        return [row["pid"] for row in await watcher.fetch(_SELECT_WAITING_SESSIONS)]

    try:
        async with locker.transaction():
            await locker.execute("lock table changes in access exclusive mode")
            await eventually(waiting_sessions, what="a batch that waits for the lock")
            await asyncio.to_thread(rig.system.children["worker"].kill)
            for pid in await waiting_sessions():
                await watcher.execute("select pg_terminate_backend($1)", pid)
            await eventually(waiting_sessions, what="no batch that waits", until=lambda pids: not pids)
    finally:
        await locker.close()
        await watcher.close()
    rig.system.start("worker")
    await rig.system.ready("worker")
