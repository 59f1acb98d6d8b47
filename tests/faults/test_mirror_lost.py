"""The mirror is frozen, killed, wiped, rolled back or failed over while PostgreSQL is behind and changes are under way.
Creations continue, priced from the last known menu; changes are refused until the mirror has caught up; no version and
no number is given twice."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.chaos.rig import COPY_AGE_SECONDS
from tests.rigs.outage import Outage, acknowledged, ask, no_version_was_claimed_twice, proven, under_load

pytestmark = pytest.mark.timeout(300)


@asynccontextmanager
async def postgres_behind(outage: Outage) -> AsyncIterator[None]:
    """Freezes PostgreSQL: changes accepted meanwhile are only in the lanes and the change log."""
    await asyncio.to_thread(outage.servers.postgres.freeze)
    try:
        yield
    finally:
        await asyncio.to_thread(outage.servers.postgres.thaw)


async def test_a_redis_frozen_for_six_seconds_loses_nothing(outage: Outage) -> None:
    await outage.new_price(1_111)
    async with under_load(outage, 1) as load:
        await acknowledged(load, 40)
        async with postgres_behind(outage):
            await acknowledged(load, 10, what="changed")
            order = load.acknowledged[-1].order
            await asyncio.to_thread(outage.servers.redis.freeze)
            try:
                frozen = asyncio.create_task(asyncio.sleep(6.0))
                await acknowledged(load, 10, what="created")
                assert (await outage.create())["subtotal"] == 1_111
                await outage.refuses_changes(order)
                await frozen
            finally:
                await asyncio.to_thread(outage.servers.redis.thaw)
            await acknowledged(load, 10, what="changed")
        await acknowledged(load, 20)
    await proven(outage, load)
    await no_version_was_claimed_twice(outage)


async def test_a_killed_and_later_wiped_redis_loses_nothing(outage: Outage) -> None:
    await outage.new_price(1_999)
    async with under_load(outage, 6) as load:
        await acknowledged(load, 40)
        async with postgres_behind(outage):
            await acknowledged(load, 10, what="changed")
            order = load.acknowledged[-1].order
            await asyncio.to_thread(outage.servers.redis.kill)
            try:
                assert (await outage.create())["subtotal"] == 1_999
                await outage.refuses_changes(order)
            finally:
                await asyncio.to_thread(outage.servers.redis.start)
        await acknowledged(load, 10, what="changed")
        async with postgres_behind(outage):
            await acknowledged(load, 10, what="changed")
            await ask(outage.servers.redis, "FLUSHALL")
            assert (await outage.create())["subtotal"] == 1_999
            await outage.refuses_changes(order)
        await outage.warm()
        await acknowledged(load, 10, what="changed")
    await proven(outage, load)
    await no_version_was_claimed_twice(outage)


async def test_a_redis_restarted_from_a_copy_ten_seconds_old_loses_nothing(outage: Outage) -> None:
    await outage.new_price(2_222)
    async with under_load(outage, 2) as load:
        await asyncio.gather(asyncio.sleep(COPY_AGE_SECONDS), acknowledged(load, 40))
        async with postgres_behind(outage):
            await acknowledged(load, 10, what="changed")
            order = load.acknowledged[-1].order
            await outage.kill_and_roll_back()
            try:
                assert (await outage.create())["subtotal"] == 2_222
            finally:
                await asyncio.to_thread(outage.servers.redis.start)
            # It holds states of every kind, but none from the last ten seconds.
            await outage.refuses_changes(order)
            await acknowledged(load, 10, what="created")
        await outage.warm()
        await acknowledged(load, 10, what="changed")
    await proven(outage, load)
    await no_version_was_claimed_twice(outage)


async def test_a_failover_to_a_replica_without_the_last_writes_loses_nothing(outage: Outage) -> None:
    await outage.new_price(3_333)
    async with under_load(outage, 3) as load:
        await acknowledged(load, 40)
        async with postgres_behind(outage):
            await acknowledged(load, 10, what="changed")
            await outage.fail_over(lost_seconds=2.0)
            order = load.acknowledged[-1].order
            assert (await outage.create())["subtotal"] == 3_333
            await outage.refuses_changes(order)
            await acknowledged(load, 10, what="created")
        await outage.warm()
        await acknowledged(load, 10, what="changed")
        # The old server comes back and also says that it is a primary: a new connection must choose the warm one.
        await asyncio.to_thread(outage.replica.start)
        await outage.restart("second-orders")
        await acknowledged(load, 20, what="changed")
    await proven(outage, load)
    await no_version_was_claimed_twice(outage)
    await outage.replicate()  # the usual repair: the old server becomes a replica of the new one
