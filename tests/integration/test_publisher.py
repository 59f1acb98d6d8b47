"""The publisher on a real RabbitMQ: a confirmed message is stored, and an unavailable broker costs one timeout."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import aio_pika
import pytest
from aio_pika.abc import AbstractConnection

from shared.messaging.management import ask
from shared.messaging.publisher import InDoubt, NotSent, Publisher
from shared.messaging.topology import CHANGES
from tests.rigs.proxy import FOUR_MBIT, Mode, Proxy
from tests.rigs.servers import Servers
from tests.rigs.system import eventually

EXCHANGE, QUEUE = "exchange", "queue"
TIMEOUT_SECONDS = 10.0
SHORT_TIMEOUT_SECONDS = 0.6  # for tests that freeze the broker


@pytest.fixture
async def vhost(servers: Servers) -> AsyncIterator[str]:
    """URL of a vhost with an exchange and a queue that is bound to it by the key `key`."""
    name = f"publisher-{uuid4().hex[:8]}"
    url = await asyncio.to_thread(servers.rabbitmq.make_vhost, name)
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        exchange = await channel.declare_exchange(EXCHANGE, "direct", durable=True)
        queue = await channel.declare_queue(QUEUE, durable=True, arguments={"x-queue-type": "quorum"})
        await queue.bind(exchange, "key")
    yield url
    await asyncio.to_thread(servers.rabbitmq.delete_vhost, name)


@asynccontextmanager
async def started(vhost: str, timeout: float, **options: Any) -> AsyncIterator[Publisher]:
    publisher = Publisher(vhost, EXCHANGE, queues=[QUEUE], timeout=timeout, **options)
    await publisher.start(wait=60)
    yield publisher
    await publisher.stop()


@pytest.fixture
async def publisher(vhost: str) -> AsyncIterator[Publisher]:
    async with started(vhost, TIMEOUT_SECONDS) as publisher:
        yield publisher


@pytest.fixture
async def impatient(vhost: str) -> AsyncIterator[Publisher]:
    async with started(vhost, SHORT_TIMEOUT_SECONDS) as publisher:
        yield publisher


async def test_nothing_is_sent_to_a_broker_without_one_of_the_queues(vhost: str) -> None:
    # The broker would confirm the messages, because it routes them to the queues that exist.
    publisher = Publisher(vhost, EXCHANGE, queues=[QUEUE, "log"], timeout=TIMEOUT_SECONDS)
    await publisher.start(wait=1)
    try:
        with pytest.raises(NotSent):
            await publisher.publish("key", b"one")
        async with await aio_pika.connect(vhost) as connection:
            channel = await connection.channel()
            await channel.declare_queue("log", durable=True, arguments={"x-queue-type": "stream"})
        await asyncio.wait_for(publisher.wait_connected(), 60)
        await publisher.publish("key", b"two")
    finally:
        await publisher.stop()
    assert await queued(vhost, b"two") == [b"two"]


async def queued(url: str, *expected: bytes) -> list[bytes]:
    """Waits until the queue has held all expected bodies; returns every body that it held."""
    bodies: list[bytes] = []

    async def take() -> set[bytes]:
        async with await aio_pika.connect(url) as connection:
            queue = await (await connection.channel()).get_queue(QUEUE, ensure=False)
            while message := await queue.get(fail=False, timeout=5):
                bodies.append(message.body)
                await message.ack()
        return set(bodies)

    await eventually(take, what=f"{expected}", until=lambda taken: taken >= set(expected))
    return bodies


def close_connections(servers: Servers, url: str) -> int:
    """Closes the connections to the vhost; returns their number."""
    vhost, api = url.rsplit("/", 1)[1], servers.rabbitmq.management_url
    found = ask(api, "GET", f"/api/vhosts/{vhost}/connections")
    assert isinstance(found, list)
    for one in found:
        ask(api, "DELETE", f"/api/connections/{quote(one['name'], safe='')}")
    return len(found)


async def confirmed(publisher: Publisher, body: bytes) -> bool:
    try:
        await publisher.publish("key", body)
    except (NotSent, InDoubt):
        return False
    return True


async def test_confirmed_message_is_queued_persistently_with_its_own_message_id(
    publisher: Publisher, vhost: str
) -> None:
    await publisher.publish("key", b"[1]", headers={"ticketrail-attempt": 2})
    await publisher.publish_to_queue(QUEUE, b"[2]")
    async with await aio_pika.connect(vhost) as connection:
        queue = await (await connection.channel()).get_queue(QUEUE, ensure=False)
        first, second = await queue.get(timeout=5), await queue.get(timeout=5)
        assert (first.body, second.body) == (b"[1]", b"[2]")
        assert first.delivery_mode == second.delivery_mode == aio_pika.DeliveryMode.PERSISTENT
        assert first.message_id != second.message_id
        assert first.headers["ticketrail-attempt"] == 2
        await first.ack()
        await second.ack()


async def test_unroutable_message_is_in_doubt_and_the_connection_stays(publisher: Publisher, vhost: str) -> None:
    with pytest.raises(InDoubt):
        await publisher.publish("unbound key", b"[]")
    assert publisher.connected
    await publisher.publish("key", b"[]")
    assert await queued(vhost, b"[]") == [b"[]"]


async def test_nothing_is_sent_without_a_connection(vhost: str) -> None:
    publisher = Publisher(vhost, EXCHANGE, queues=[QUEUE], timeout=TIMEOUT_SECONDS)
    with pytest.raises(NotSent):
        await publisher.publish("key", b"[]")
    await publisher.stop()
    await publisher.start(wait=10)
    await publisher.stop()
    await publisher.stop()
    with pytest.raises(NotSent):
        await publisher.publish("key", b"[]")


async def test_start_with_an_unavailable_broker_returns_after_its_wait(servers: Servers) -> None:
    publisher = Publisher("amqp://nobody:none@127.0.0.1:1/", EXCHANGE, queues=[QUEUE], timeout=600.0)
    await asyncio.wait_for(publisher.start(wait=0.3), 30)
    assert not publisher.connected
    await publisher.stop()


async def test_frozen_broker_costs_one_timeout_and_later_publishes_fail_at_once(
    servers: Servers, impatient: Publisher, vhost: str
) -> None:
    await asyncio.to_thread(servers.rabbitmq.freeze)
    try:
        began = time.monotonic()
        async with asyncio.timeout(20):
            together = await asyncio.gather(
                *(impatient.publish("key", b"[%d]" % n) for n in range(3)), return_exceptions=True
            )
        assert [type(one) for one in together] == [InDoubt] * 3
        assert time.monotonic() - began > SHORT_TIMEOUT_SECONDS * 0.9
        for _ in range(20):
            with pytest.raises(NotSent):
                await impatient.publish("key", b"[never]")
    finally:
        await asyncio.to_thread(servers.rabbitmq.thaw)
    await eventually(lambda: confirmed(impatient, b"[after]"), what="a confirm")
    expected = {b"[0]", b"[1]", b"[2]", b"[after]"}  # the messages in doubt have arrived
    assert set(await queued(vhost, *expected)) == expected


@asynccontextmanager
async def behind_proxy(servers: Servers, vhost: str, timeout: float) -> AsyncIterator[tuple[Publisher, Proxy]]:
    """Yields a publisher that is connected through a proxy."""
    proxy = Proxy(servers.rabbitmq.port)
    await proxy.start()
    try:
        async with started(vhost.replace(f":{servers.rabbitmq.port}/", f":{proxy.port}/"), timeout) as publisher:
            yield publisher, proxy
    finally:
        await proxy.stop()


async def test_slow_broker_is_not_taken_for_an_unavailable_one(servers: Servers, vhost: str) -> None:
    async with behind_proxy(servers, vhost, SHORT_TIMEOUT_SECONDS) as (publisher, proxy):
        proxy.set(Mode.FORWARD, bandwidth=FOUR_MBIT)
        # Each message takes longer than the timeout, and the last one waits for the bytes of all others too.
        bodies = [b"[%d]" % number + b" " * 800_000 for number in range(3)]
        await asyncio.gather(*(publisher.publish("key", body) for body in bodies))
        proxy.set(Mode.FORWARD)
        assert sorted(await queued(vhost, *bodies)) == sorted(bodies), "a message was sent twice"
        assert proxy.accepted == 1


async def test_connection_stays_after_a_timeout_if_another_message_was_answered_in_that_time(
    servers: Servers, vhost: str
) -> None:
    async with behind_proxy(servers, vhost, 3.0) as (publisher, proxy):
        proxy.set(Mode.FORWARD, bandwidth=50_000)  # slower than the publisher waits for
        bodies = [b"[%d]" % number + b" " * 10_000 for number in range(60)]
        found = await asyncio.gather(*(publisher.publish("key", body) for body in bodies), return_exceptions=True)
        assert None in found
        assert {type(one) for one in found} == {type(None), InDoubt}
        assert publisher.connected
        proxy.set(Mode.FORWARD)
        await publisher.publish("key", b"[]")
        confirmed = [body for body, error in zip(bodies, found, strict=True) if error is None]
        arrived = await queued(vhost, b"[]", *confirmed)
        assert len(arrived) == len(set(arrived)), "a message was sent twice"
        assert proxy.accepted == 1


async def test_lost_connection_is_noticed_without_a_publish_and_replaced(servers: Servers, vhost: str) -> None:
    connections: list[AbstractConnection] = []

    async def connect(*args: Any, **options: Any) -> AbstractConnection:
        connections.append(await aio_pika.connect(*args, **options))
        return connections[-1]

    async with started(vhost, TIMEOUT_SECONDS, connect=connect) as publisher:
        assert publisher.connected
        # The broker closes the connection. Its list of connections shows it only after some seconds.
        await eventually(
            lambda: asyncio.to_thread(close_connections, servers, vhost), within=30, what="a connection to close"
        )

        async def renewed() -> bool:
            return publisher.connected and len(connections) > 1

        await eventually(renewed, what="another connection")
        await publisher.publish("key", b"[]")
    assert await queued(vhost, b"[]") == [b"[]"]


async def test_publisher_reconnects_after_the_broker_was_stopped_and_started(
    servers: Servers, publisher: Publisher, vhost: str
) -> None:
    await publisher.publish("key", b"[before]")
    await asyncio.to_thread(servers.rabbitmq.stop)
    with pytest.raises((NotSent, InDoubt)):
        await publisher.publish("key", b"[lost]")
    await asyncio.to_thread(servers.rabbitmq.start)
    await eventually(lambda: confirmed(publisher, b"[after]"), what="a confirm")
    assert set(await queued(vhost, b"[before]", b"[after]")) == {b"[before]", b"[after]"}


async def test_publisher_retries_after_any_error_of_a_broken_handshake(servers: Servers) -> None:
    """A proxy in front of a starting broker closes the connection during the handshake. aio-pika then raises
    StopAsyncIteration."""
    errors: list[Exception] = [StopAsyncIteration(), ValueError("half a frame")]

    async def connect(*args: Any, **options: Any) -> AbstractConnection:
        if errors:
            raise errors.pop()
        return await aio_pika.connect(*args, **options)

    publisher = Publisher(servers.rabbitmq.url, CHANGES, queues=[], timeout=1.0, connect=connect)
    await publisher.start()
    try:
        await asyncio.wait_for(publisher.wait_connected(), 10)
    finally:
        await publisher.stop()
    assert not errors
