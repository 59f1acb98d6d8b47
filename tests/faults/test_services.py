"""Services killed under load, and services that must refuse to run."""

import asyncio

import aio_pika
import httpx
import pytest
import redis.asyncio

from deploy.local.ports import find_free
from shared.entities.contract import Lane
from shared.messaging import topology
from tests.faults.load import Load
from tests.system import System, eventually

pytestmark = pytest.mark.timeout(150)


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


async def test_two_of_each_service_work_side_by_side(victim: System) -> None:
    ports = dict(zip(("orders_port", "worker_port", "notifier_port"), find_free(3), strict=True))
    for name, port in zip(("orders", "worker", "notifier"), ports.values(), strict=True):
        victim.urls[f"second-{name}"] = f"http://127.0.0.1:{port}"
        victim.start(name, alias=f"second-{name}", instance=2, **ports)
        await victim.ready(f"second-{name}")
    async with Load(victim, instances=("orders", "second-orders")) as load:
        await load.more(40)
        await asyncio.to_thread(victim.redis.kill)
        await load.more(20)
        await asyncio.to_thread(victim.redis.start)
        await eventually(victim.warm, what="warm again", within=20, until=lambda state: state == "warm")
        await load.more(20)
        for name in ("worker", "second-worker"):
            await victim.ready(name)
    await load.everything_arrives()
    await load.the_list_is_right()
    for name in ("worker", "second-worker"):
        rewinds = (victim.directory / f"{name}.log").read_text().count("mirror_rewind")
        assert rewinds < 10, f"{name} rewound {rewinds} times: the two fight over the mirror"
