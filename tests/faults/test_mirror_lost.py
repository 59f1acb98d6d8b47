"""The mirror is frozen, killed, wiped, rolled back or failed over, while PostgreSQL is behind and changes are under
way. Creations continue and are priced from the last known menu. Changes are refused until the mirror has caught up. No
version and no number is given twice."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.chaos.rig import COPY_AGE_SECONDS
from tests.rigs.outage import (
    Outage,
    assert_no_version_claimed_twice,
    under_load,
    wait_acknowledged,
    wait_and_prove,
)

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]  # its load goes on through outages and failovers


@asynccontextmanager
async def postgres_behind(outage: Outage) -> AsyncIterator[None]:
    """Freezes PostgreSQL for the block: changes that are accepted in the block are only in the lanes and the change
    log."""
    await asyncio.to_thread(outage.servers.postgres.freeze)
    try:
        yield
    finally:
        await asyncio.to_thread(outage.servers.postgres.thaw)


async def test_a_redis_frozen_for_six_seconds_loses_nothing(outage: Outage) -> None:
    await outage.change_price(1_111)
    async with under_load(outage, 1) as load:
        await wait_acknowledged(load, 40)
        async with postgres_behind(outage):
            await wait_acknowledged(load, 10, kind="changed")
            order = load.acknowledged[-1].order
            await asyncio.to_thread(outage.servers.redis.freeze)
            try:
                frozen = asyncio.create_task(asyncio.sleep(6.0))
                await wait_acknowledged(load, 10, kind="created")
                assert (await outage.create())["subtotal"] == 1_111
                await outage.assert_refuses_changes(order)
                await frozen
            finally:
                await asyncio.to_thread(outage.servers.redis.thaw)
            await wait_acknowledged(load, 10, kind="changed")
        await wait_acknowledged(load, 20)
    await wait_and_prove(outage, load)
    await assert_no_version_claimed_twice(outage)


async def test_a_killed_and_later_wiped_redis_loses_nothing(outage: Outage) -> None:
    await outage.change_price(1_999)
    async with under_load(outage, 6) as load:
        await wait_acknowledged(load, 40)
        async with postgres_behind(outage):
            await wait_acknowledged(load, 10, kind="changed")
            order = load.acknowledged[-1].order
            await asyncio.to_thread(outage.servers.redis.kill)
            try:
                assert (await outage.create())["subtotal"] == 1_999
                await outage.assert_refuses_changes(order)
            finally:
                await asyncio.to_thread(outage.servers.redis.start)
        await wait_acknowledged(load, 10, kind="changed")
        async with postgres_behind(outage):
            await wait_acknowledged(load, 10, kind="changed")
            await outage.servers.redis.command("FLUSHALL")
            assert (await outage.create())["subtotal"] == 1_999
            await outage.assert_refuses_changes(order)
        await outage.warm()
        await wait_acknowledged(load, 10, kind="changed")
    await wait_and_prove(outage, load)
    await assert_no_version_claimed_twice(outage)


async def test_a_redis_restarted_from_a_copy_ten_seconds_old_loses_nothing(outage: Outage) -> None:
    await outage.change_price(2_222)
    async with under_load(outage, 2) as load:
        await asyncio.gather(asyncio.sleep(COPY_AGE_SECONDS), wait_acknowledged(load, 40))
        async with postgres_behind(outage):
            await wait_acknowledged(load, 10, kind="changed")
            order = load.acknowledged[-1].order
            await outage.kill_and_roll_back()
            try:
                assert (await outage.create())["subtotal"] == 2_222
            finally:
                await asyncio.to_thread(outage.servers.redis.start)
            # The copy holds states of every kind, but none from the last ten seconds.
            await outage.assert_refuses_changes(order)
            await wait_acknowledged(load, 10, kind="created")
        await outage.warm()
        await wait_acknowledged(load, 10, kind="changed")
    await wait_and_prove(outage, load)
    await assert_no_version_claimed_twice(outage)


async def test_a_failover_to_a_replica_without_the_last_writes_loses_nothing(outage: Outage) -> None:
    await outage.change_price(3_333)
    async with under_load(outage, 3) as load:
        await wait_acknowledged(load, 40)
        async with postgres_behind(outage):
            await wait_acknowledged(load, 10, kind="changed")
            await outage.mirror.fail_over(lost_seconds=2.0)
            order = load.acknowledged[-1].order
            assert (await outage.create())["subtotal"] == 3_333
            await outage.assert_refuses_changes(order)
            await wait_acknowledged(load, 10, kind="created")
        await outage.warm()
        await wait_acknowledged(load, 10, kind="changed")
        # The old server comes back and also says that it is a primary: a new connection must choose the warm one.
        await asyncio.to_thread(outage.mirror.replica.start)
        await outage.restart("second-orders")
        await wait_acknowledged(load, 20, kind="changed")
    await wait_and_prove(outage, load)
    await assert_no_version_claimed_twice(outage)
    await outage.mirror.replicate()  # the usual repair: the old server becomes a replica of the new one


async def test_a_failover_and_a_failback_to_a_server_that_never_stopped_lose_nothing(outage: Outage) -> None:
    """The first server keeps its run id, and each promotion gives the data another replication id."""
    async with under_load(outage, 5) as load:
        await wait_acknowledged(load, 40)
        first = await outage.servers.redis.command("INFO", "server")
        for _ in range(2):
            await outage.mirror.switch_over(lost_seconds=1.0)
            await wait_acknowledged(load, 10, kind="created")
            await outage.warm()
            await wait_acknowledged(load, 10, kind="changed")
        assert (await outage.servers.redis.command("INFO", "server"))["run_id"] == first["run_id"]
    await wait_and_prove(outage, load)
    await assert_no_version_claimed_twice(outage)
