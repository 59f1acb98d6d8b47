"""A RabbitMQ that has just started answers before its queues and streams are back. Such a broker is
not ready yet, but it is not broken."""

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import aio_pika
import pytest
from click.testing import CliRunner, Result

from services.sync.cli.main import main
from shared.entities.contract import Lane
from shared.messaging import declare, topology
from shared.messaging.log import LogReader
from shared.messaging.publisher import BROKEN_LINK
from shared.messaging.recovery import BrokerNotReady, when_ready
from shared.settings import Settings
from tests.rigs.power_cut import OwnBroker
from tests.rigs.servers import Servers
from tests.rigs.system import System

pytestmark = pytest.mark.timeout(600)

MESSAGES = 300  # in each queue; the messages of the lanes reach the streams too


@pytest.fixture
async def system(servers: Servers) -> AsyncIterator[System]:
    folder = Path(tempfile.mkdtemp(prefix="ticketrail-recovering-"))
    own = OwnBroker(servers, folder)
    await asyncio.to_thread(own.rabbitmq.start)
    try:
        system = System(own, folder)
        try:
            yield system
        finally:
            await asyncio.to_thread(servers.postgres.drop_database, system.name)
    finally:
        await asyncio.to_thread(own.rabbitmq.discard)
        shutil.rmtree(folder, ignore_errors=True)


async def fill(url: str) -> None:
    """Puts messages into every lane and every dead-letter queue; through the lanes they also reach both streams."""
    connection = await aio_pika.connect(url)
    async with connection:
        channel = await connection.channel()
        exchange = await channel.get_exchange(topology.CHANGES, ensure=False)

        def message() -> aio_pika.Message:
            return aio_pika.Message(b"x" * 1_000, delivery_mode=2)

        for lane in Lane:
            await asyncio.gather(*(exchange.publish(message(), lane.value) for _ in range(MESSAGES)))
            dead = topology.dead_queue(lane)
            await asyncio.gather(*(channel.default_exchange.publish(message(), dead) for _ in range(MESSAGES)))


async def read_log(url: str) -> int:
    """Counts the entries of the log from its beginning to its current end."""
    reader, found = LogReader(url, name="test", idle_seconds=5.0), 0
    async with asyncio.timeout(60):
        async for batch in reader.read("first"):
            found += len(batch.entries)
            if batch.caught_up:
                break
    return found


async def first_connection(url: str) -> None:
    """Waits until the broker accepts a connection. Its queues recover in the next 0.3 s, so callers must continue at
    once."""
    async with asyncio.timeout(120):
        while True:
            try:
                async with await declare.connect(url):
                    return
            except BROKEN_LINK:
                await asyncio.sleep(0.01)


async def unrecovered_answers(url: str) -> int:
    """Asks for the log until the broker has recovered it. Returns how often the answer was "home node
    ... is down"."""
    found = 0
    async with asyncio.timeout(60):
        while True:
            try:
                async with await declare.connect(url) as connection:
                    assert await declare.log_exists(connection)
                    return found
            except BROKEN_LINK as error:
                found += "home node" in str(error)
                await asyncio.sleep(0.01)


def migrate(environment: dict[str, str]) -> Result:
    """Runs `ticketrail migrate` in this process, because a new process starts more slowly than the broker recovers."""
    return CliRunner().invoke(main, ["migrate"], env=environment)


# Not every restart shows a queue that has not recovered. Two restarts may show none; twelve show several.
@pytest.mark.parametrize("restarts", [2, pytest.param(12, marks=pytest.mark.slow)])
async def test_migrate_start_checks_and_readers_wait_for_a_recovering_broker(system: System, restarts: int) -> None:
    await system.cli("migrate")
    assert isinstance(system.servers, OwnBroker)
    await system.servers.streams_on_disk()
    settings = Settings(rabbitmq_url=system.rabbitmq_url, retry_steps_ms=(50, 100, 200))
    await fill(system.rabbitmq_url)
    broker = system.servers.rabbitmq
    unrecovered = 0
    for _ in range(restarts):
        await asyncio.to_thread(broker.kill)
        start = asyncio.create_task(asyncio.to_thread(broker.start))
        await first_connection(system.rabbitmq_url)
        seen, migrated, ready, _, entries = await asyncio.gather(
            unrecovered_answers(system.rabbitmq_url),
            asyncio.to_thread(migrate, system.env),
            declare.check_at_start(settings, within=60),
            declare.check_log_at_start(settings),
            read_log(system.rabbitmq_url),
        )
        await start
        unrecovered += seen
        assert migrated.exit_code == 0, migrated.output
        assert "topology: up to date" in migrated.output
        assert ready
        assert entries == MESSAGES * len(Lane)
    assert unrecovered or restarts < 12, "no restart showed a queue that had not recovered"


async def test_a_missing_queue_is_refused_at_once_and_an_unavailable_broker_at_the_deadline(system: System) -> None:
    await system.cli("migrate")
    settings = Settings(rabbitmq_url=system.rabbitmq_url, retry_steps_ms=(50, 100, 200))

    async def delete(connection: aio_pika.abc.AbstractConnection) -> None:
        await (await connection.channel()).queue_delete(topology.LOG)

    await when_ready(system.rabbitmq_url, delete, within=60)
    hour = 3_600.0  # longer than the timeout of the test, so that the test fails if the check waits for this deadline
    with pytest.raises(declare.TopologyError, match=topology.LOG):
        await declare.check_at_start(settings, within=hour)
    with pytest.raises(declare.TopologyError, match=topology.LOG):
        await declare.check_log_at_start(settings)
    wrong = system.rabbitmq_url.replace(":ticketrail@", ":another@")
    with pytest.raises(BrokerNotReady, match="REFUSED"):
        await when_ready(wrong, declare.log_exists, within=hour)

    await asyncio.to_thread(system.servers.rabbitmq.stop)
    with pytest.raises(BrokerNotReady):
        await when_ready(system.rabbitmq_url, declare.log_exists, within=1.0)
