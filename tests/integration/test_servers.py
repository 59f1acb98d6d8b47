"""The test servers behave as the fault tests expect, whether they are processes or containers."""

import asyncio
from collections.abc import AsyncIterator
from uuid import uuid4

import aio_pika
import asyncpg
import pytest
import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from tests.rigs.servers import Servers

SHORT_TIMEOUT_SECONDS = 1.5  # the time after which a client gives up on a frozen server


def connect_redis(url: str) -> redis.asyncio.Redis:
    return redis.asyncio.Redis.from_url(url, socket_timeout=SHORT_TIMEOUT_SECONDS, retry=Retry(NoBackoff(), 0))


@pytest.fixture
async def vhost(servers: Servers) -> AsyncIterator[str]:
    """The URL of a vhost for one test."""
    name = f"test-{uuid4().hex[:8]}"
    url = await asyncio.to_thread(servers.rabbitmq.make_vhost, name)
    yield url
    await asyncio.to_thread(servers.rabbitmq.delete_vhost, name)


@pytest.fixture
async def database(servers: Servers) -> AsyncIterator[str]:
    """The URL of a database for one test."""
    name = f"test_{uuid4().hex[:8]}"
    url = await asyncio.to_thread(servers.postgres.make_database, name)
    yield url
    await asyncio.to_thread(servers.postgres.drop_database, name)


async def publish(url: str, queue: str, body: bytes) -> None:
    async with await aio_pika.connect(url, timeout=10) as connection:
        channel = await connection.channel(on_return_raises=True)
        await channel.declare_queue(queue, durable=True, arguments={"x-queue-type": "quorum"})
        message = aio_pika.Message(body, delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        await channel.default_exchange.publish(message, queue, mandatory=True, timeout=10)


async def take(url: str, queue: str) -> bytes:
    async with await aio_pika.connect(url, timeout=10) as connection:
        declared = await (await connection.channel()).get_queue(queue)
        message = await declared.get(timeout=10)
        await message.ack()
        return message.body


async def test_killed_rabbitmq_keeps_its_confirmed_messages(servers: Servers, vhost: str) -> None:
    await publish(vhost, "kept", b"an order")
    # RabbitMQ writes the list of its quorum queues every 500 ms. A queue that was declared right before a kill -9 is
    # unusable after the restart, so the test waits. Messages are never lost that way: the second one needs no pause.
    await asyncio.sleep(6)
    await publish(vhost, "kept", b"another order")
    await asyncio.to_thread(servers.rabbitmq.kill)
    with pytest.raises(OSError):
        await aio_pika.connect(vhost, timeout=2)
    await asyncio.to_thread(servers.rabbitmq.start)
    assert [await take(vhost, "kept"), await take(vhost, "kept")] == [b"an order", b"another order"]


async def test_rabbitmq_stopped_twice_starts_again_with_its_data(servers: Servers, vhost: str) -> None:
    await publish(vhost, "kept", b"an order")
    await asyncio.to_thread(servers.rabbitmq.stop)
    await asyncio.to_thread(servers.rabbitmq.stop)
    await asyncio.to_thread(servers.rabbitmq.start)
    assert await take(vhost, "kept") == b"an order"


async def test_frozen_rabbitmq_confirms_nothing_until_it_is_thawed(servers: Servers, vhost: str) -> None:
    async with await aio_pika.connect(vhost, timeout=10) as connection:
        channel = await connection.channel()
        queue = await channel.declare_queue("slow", durable=True, arguments={"x-queue-type": "quorum"})
        await asyncio.to_thread(servers.rabbitmq.freeze)
        try:
            with pytest.raises(TimeoutError):
                await channel.default_exchange.publish(aio_pika.Message(b"late"), "slow", timeout=SHORT_TIMEOUT_SECONDS)
        finally:
            await asyncio.to_thread(servers.rabbitmq.thaw)
        # The frozen server handles the message in its socket later, so a timeout means "in doubt".
        message = await queue.get(timeout=10, fail=False)
        while message is None:
            message = await queue.get(timeout=10, fail=False)
        assert message.body == b"late"
        await message.ack()


async def test_killed_postgres_keeps_a_committed_row(servers: Servers, database: str) -> None:
    connection = await asyncpg.connect(database)
    await connection.execute("create table kept (id int primary key)")
    await connection.execute("insert into kept values (42)")
    await asyncio.to_thread(servers.postgres.kill)
    with pytest.raises((OSError, asyncpg.PostgresError, asyncpg.InterfaceError)):
        await connection.fetchval("select id from kept")
    connection.terminate()
    await asyncio.to_thread(servers.postgres.start)
    connection = await asyncpg.connect(database)
    assert await connection.fetchval("select id from kept") == 42
    await connection.close()


async def test_frozen_postgres_times_out_and_answers_when_thawed(servers: Servers, database: str) -> None:
    connection = await asyncpg.connect(database)
    await asyncio.to_thread(servers.postgres.freeze)
    try:
        with pytest.raises(TimeoutError):
            await connection.fetchval("select 1", timeout=SHORT_TIMEOUT_SECONDS)
    finally:
        await asyncio.to_thread(servers.postgres.thaw)
        connection.terminate()
    connection = await asyncpg.connect(database, timeout=10)
    assert await connection.fetchval("select 1") == 1
    await connection.close()


async def test_database_from_a_template_has_its_tables_and_its_owner_may_create_roles(
    servers: Servers, database: str
) -> None:
    connection = await asyncpg.connect(database)
    await connection.execute("create table copied (id int)")
    assert await connection.fetchval("select rolcreaterole and not rolsuper from pg_roles where rolname = current_user")
    await connection.close()
    name = f"test_{uuid4().hex[:8]}"
    url = await asyncio.to_thread(servers.postgres.make_database, name, database.rsplit("/", 1)[1])
    try:
        connection = await asyncpg.connect(url)
        await connection.execute("insert into copied values (1)")
        await connection.close()
    finally:
        await asyncio.to_thread(servers.postgres.drop_database, name)


async def test_killed_redis_keeps_its_keys_and_gets_another_run_id(servers: Servers) -> None:
    extra = await asyncio.to_thread(servers.extra_redis)
    client = connect_redis(extra.url)
    await client.set("kept", "an order")
    before = (await client.info("server"))["run_id"]
    await asyncio.to_thread(extra.kill)
    with pytest.raises(redis.exceptions.ConnectionError):
        await client.get("kept")
    await asyncio.to_thread(extra.start)
    assert await client.get("kept") == b"an order"
    assert (await client.info("server"))["run_id"] != before
    await client.aclose()
    await asyncio.to_thread(extra.discard)


async def test_frozen_redis_times_out_answers_when_thawed_and_never_evicts(servers: Servers) -> None:
    client = connect_redis(servers.redis.url)
    assert (await client.config_get("maxmemory-policy"))["maxmemory-policy"] == "noeviction"
    await asyncio.to_thread(servers.redis.freeze)
    try:
        with pytest.raises(redis.exceptions.TimeoutError):
            await client.ping()
    finally:
        await asyncio.to_thread(servers.redis.thaw)
    assert await client.ping()
    await client.aclose()
