"""Each backend ended under load: nothing that was acknowledged is lost, and nothing is there twice."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aio_pika
import httpx
import pytest
import redis.asyncio

from shared.entities.contract import Lane
from shared.messaging import topology
from tests.faults.load import Load
from tests.servers import Servers
from tests.system import System, eventually

pytestmark = pytest.mark.timeout(150)


@pytest.fixture
async def victim(servers: Servers, tmp_path: Path) -> AsyncIterator[System]:
    """A system of its own, with a Redis of its own."""
    own_redis = await asyncio.to_thread(servers.extra_redis)
    system = System(servers, tmp_path, redis=own_redis)
    try:
        await system.up()
        yield system
    finally:
        await system.down()
        await asyncio.to_thread(own_redis.discard)


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


async def test_the_orders_service_killed_under_load_loses_nothing_that_it_acknowledged(victim: System) -> None:
    async with Load(victim) as load:
        for _ in range(3):
            await load.more(40)
            victim.kill("orders")
            victim.start("orders")
            await victim.ready("orders")
        await load.more(20)
    await load.everything_arrives()

    async def claims_left() -> int:
        async with redis.asyncio.from_url(victim.redis.url) as mirror:
            return int(await mirror.zcard("ticketrail:claims"))

    await eventually(claims_left, what="claims of the dead to be finished", until=lambda count: count == 0)


async def test_the_sync_worker_killed_under_load_settles_everything_when_it_returns(victim: System) -> None:
    async with Load(victim) as load:
        await load.more(40)
        victim.kill("worker")
        await load.more(40)
        await load.the_list_is_right()
        victim.start("worker")
        await victim.ready("worker")
        await load.more(20)
    assert load.refused.total() == 0
    await load.everything_arrives()
    await load.the_list_is_right()


@pytest.mark.parametrize("queue", [topology.lane_queue(Lane.CRITICAL), topology.LOG])
async def test_a_missing_binding_refuses_readiness_and_start(victim: System, queue: str) -> None:
    connection = await aio_pika.connect(victim.rabbitmq_url)
    async with connection:
        channel = await connection.channel()
        exchange = await channel.get_exchange(topology.CHANGES, ensure=False)
        await (await channel.get_queue(queue, ensure=False)).unbind(exchange, "critical")

    async def readiness() -> int:
        async with httpx.AsyncClient() as client:
            return (await client.get(f"{victim.urls['worker']}/health/ready")).status_code

    await eventually(readiness, what="not ready", until=lambda status: status == 503)
    await victim.stop("worker")
    victim.start("worker")

    async def ended() -> int | None:
        return victim.children["worker"].returncode

    await eventually(ended, within=30, what="refused to start", until=lambda code: code is not None)
    assert queue in victim.children["worker"].tail(20)
    await victim.cli("migrate")
    victim.start("worker")
    await victim.ready("worker")


async def test_services_refuse_to_start_on_a_broker_without_their_queues(victim: System) -> None:
    connection = await aio_pika.connect(victim.rabbitmq_url)
    async with connection:
        channel = await connection.channel()
        await channel.queue_delete(topology.retry_queue(Lane.NORMAL, 50))
    for name in ("orders", "worker"):
        await victim.stop(name)
        victim.start(name)

        async def ended(name: str = name) -> int | None:
            return victim.children[name].returncode

        await eventually(ended, within=30, what=f"{name} refused", until=lambda code: code is not None)
        assert "ticketrail migrate" in victim.children[name].tail(40)
