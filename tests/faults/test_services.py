"""Services killed under load, and services that must refuse to run."""

import asyncio
import random
from pathlib import Path

import aio_pika
import pytest

from shared.entities.contract import Lane
from shared.messaging import topology
from tests.rigs.http_client import http_client
from tests.rigs.outage import Outage, under_load, wait_acknowledged, wait_and_prove
from tests.rigs.servers.processes import local_redis
from tests.rigs.system import System, eventually

pytestmark = pytest.mark.timeout(300)


@pytest.mark.slow  # it starts three instances of each service
async def test_one_of_three_instances_of_a_service_can_be_killed_or_stopped_under_load(outage: Outage) -> None:
    added = [
        ("second-worker", 2), ("second-sync", 2), ("second-notifier", 2),
        ("third-orders", 3), ("third-worker", 3), ("third-sync", 3), ("third-notifier", 3),
    ]  # fmt: skip
    await asyncio.gather(*(outage.add(*one) for one in added))
    chance = random.Random(3)
    rewound = rewinds(outage)
    try:
        async with under_load(outage, 3) as load:
            for how in ("killed", "stopped"):
                for service in ("worker", "orders", "notifier", "sync"):
                    await wait_acknowledged(load, chance.randrange(1, 20))
                    name = chance.choice([one for one in outage.system.children if one.endswith(service)])
                    if how == "killed":
                        await asyncio.to_thread(outage.target(name).kill)
                    else:
                        assert await outage.system.stop(name, within=20.0), f"{name} still ran after 20 s"
                    await wait_acknowledged(load, 5)
                    await outage.start_again(name)
            await wait_acknowledged(load, 20)
        await wait_and_prove(outage, load)
    finally:
        for name, _ in added:
            await outage.system.stop(name)
            del outage.system.urls[name]
    assert rewinds(outage) - rewound < 10, "the workers keep rewinding the mirror in turn"


def rewinds(outage: Outage) -> int:
    return sum(log.read_text().count("mirror_rewind") for log in outage.system.directory.glob("*worker.log"))


@pytest.mark.parametrize(
    "queue", [pytest.param(topology.lane_queue(Lane.CRITICAL), marks=pytest.mark.slow), topology.LOG]
)
async def test_a_worker_is_not_ready_and_does_not_start_without_a_binding(victim: System, queue: str) -> None:
    connection = await aio_pika.connect(victim.rabbitmq_url)
    async with connection:
        channel = await connection.channel()
        exchange = await channel.get_exchange(topology.CHANGES, ensure=False)
        await (await channel.get_queue(queue, ensure=False)).unbind(exchange, "critical")

    async def readiness() -> int:
        async with http_client() as client:
            return (await client.get(f"{victim.urls['worker']}/health/ready")).status_code

    await eventually(readiness, what="a worker that is not ready", until=lambda status: status == 503)
    await victim.stop("worker")
    # The worker checks heartbeats once, three intervals after its start; a longer interval leaves it time to start.
    victim.start("worker", heartbeat_interval_seconds=3)

    async def ended() -> int | None:
        return victim.children["worker"].returncode

    await eventually(
        ended, within=90, what="the end of a worker that lacks a binding", until=lambda code: code is not None
    )
    assert queue in victim.children["worker"].tail(20)
    await victim.cli("migrate")
    victim.start("worker")
    await victim.ready("worker")


@pytest.mark.parametrize("name", ["orders", "worker", "sync"])
async def test_service_refuses_to_start_on_a_redis_that_cannot_be_a_mirror(
    victim: System, name: str, tmp_path: Path
) -> None:
    server = local_redis(tmp_path, "--cluster-enabled", "yes")
    await asyncio.to_thread(server.start)
    await victim.stop(name)
    victim.start(name, redis_url=server.url)

    async def ended() -> int | None:
        return victim.children[name].returncode

    try:
        await eventually(ended, within=30, what=f"the end of {name}", until=lambda code: code is not None)
        assert "set `cluster-enabled no`" in victim.children[name].tail(40)
    finally:
        await victim.stop(name)
        victim.start(name)
        await victim.ready(name)
        await asyncio.to_thread(server.discard)


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

        await eventually(ended, within=30, what=f"the end of {name}", until=lambda code: code is not None)
        assert "ticketrail migrate" in victim.children[name].tail(40)
    await victim.cli("migrate")
    for name in ("orders", "worker"):
        victim.start(name)
        await victim.ready(name)
