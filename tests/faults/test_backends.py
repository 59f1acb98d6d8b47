"""Each backend ended under load: nothing that was acknowledged is lost, and nothing is there twice."""

import asyncio
import time

import httpx
import pytest
import redis.asyncio

from tests.faults.load import Load
from tests.system import System, eventually

pytestmark = pytest.mark.timeout(150)


async def outage(seconds: float, load: Load) -> None:
    """Lets the outage last, with orders being acknowledged all the while."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        await load.more(5, within=10.0)


async def test_postgresql_stopped_for_20_seconds_under_load(victim: System) -> None:
    async with Load(victim) as load:
        await load.more(50)
        await asyncio.to_thread(victim.servers.postgres.kill)
        try:
            await outage(10.0, load)
            await load.the_list_is_right()
            await outage(10.0, load)
        finally:
            await asyncio.to_thread(victim.servers.postgres.start)
        await load.more(20)
        await load.the_list_is_right()
    assert load.refused.total() == 0
    assert load.unknown == 0
    await load.everything_arrives()
    await load.nothing_is_dead()
    await load.the_list_is_right()


async def test_rabbitmq_stopped_for_20_seconds_under_load(victim: System) -> None:
    async with Load(victim) as load:
        await load.more(50)
        await asyncio.to_thread(victim.servers.rabbitmq.kill)
        try:
            await outage(20.0, load)
            await load.the_list_is_right()
        finally:
            await asyncio.to_thread(victim.servers.rabbitmq.start)
        await load.more(20)
    assert load.journaled > 0
    assert load.refused.total() == 0
    assert load.unknown == 0

    async def journal_depth() -> int:
        async with httpx.AsyncClient() as client:
            return int((await client.get(f"{victim.urls['orders']}/health/ready")).json()["journal"]["depth"])

    await eventually(journal_depth, within=30, what="an empty journal", until=lambda depth: depth == 0)
    await load.everything_arrives()
    await load.nothing_is_dead()


async def test_the_mirror_wiped_under_load(victim: System) -> None:
    async with Load(victim) as load, redis.asyncio.from_url(victim.redis.url) as mirror:
        for _ in range(3):
            await load.more(40)
            await mirror.flushall()
            await eventually(victim.warm, what="cold", within=10, until=lambda state: state == "cold")
            await load.more(10)
            await eventually(victim.warm, what="warm again", within=20, until=lambda state: state == "warm")
        await load.more(20)
    assert load.refused["POST", 503] == 0, "creations go on while the mirror is cold"
    await load.everything_arrives()
    await load.the_list_is_right()


async def test_redis_killed_and_started_again_under_load(victim: System) -> None:
    async with Load(victim) as load:
        await load.more(40)
        await asyncio.to_thread(victim.redis.kill)
        await load.more(40)
        await asyncio.to_thread(victim.redis.start)
        await eventually(victim.warm, what="warm again", within=20, until=lambda state: state == "warm")
        await load.more(20)
    assert load.refused["POST", 503] == 0
    assert load.refused["PUT", 503] > 0
    await load.everything_arrives()
    await load.the_list_is_right()
