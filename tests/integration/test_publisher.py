"""The publisher on a real RabbitMQ: confirmed means there, and a broker that is away or frozen costs one timeout."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import aio_pika
import pytest

from shared.messaging.management import ask
from shared.messaging.publisher import InDoubt, NotSent, Publisher
from shared.messaging.topology import CHANGES
from tests.rigs.servers import Servers
from tests.rigs.system import eventually

EXCHANGE, QUEUE = "exchange", "queue"
TIMEOUT = 10.0
IMPATIENT = 0.6  # for a broker that is frozen


@pytest.fixture
async def vhost(servers: Servers) -> AsyncIterator[str]:
    """With an exchange and a queue that is bound to it by the key `key`."""
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
async def started(vhost: str, timeout: float) -> AsyncIterator[Publisher]:
    publisher = Publisher(vhost, EXCHANGE, queues=[QUEUE], timeout=timeout)
    await publisher.start(wait=60)
    yield publisher
    await publisher.stop()


@pytest.fixture
async def publisher(vhost: str) -> AsyncIterator[Publisher]:
    async with started(vhost, TIMEOUT) as publisher:
        yield publisher


@pytest.fixture
async def hasty(vhost: str) -> AsyncIterator[Publisher]:
    async with started(vhost, IMPATIENT) as publisher:
        yield publisher


async def test_to_a_broker_that_lacks_one_of_its_queues_nothing_is_sent(vhost: str) -> None:
    # It would confirm all the same: what is bound and not there is not routed to.
    publisher = Publisher(vhost, EXCHANGE, queues=[QUEUE, "log"], timeout=TIMEOUT)
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


async def queued(url: str, *wanted: bytes) -> list[bytes]:
    """What the queue held, once all that is wanted was among it."""
    bodies: list[bytes] = []

    async def take() -> set[bytes]:
        async with await aio_pika.connect(url) as connection:
            queue = await (await connection.channel()).get_queue(QUEUE, ensure=False)
            while message := await queue.get(fail=False, timeout=5):
                bodies.append(message.body)
                await message.ack()
        return set(bodies)

    await eventually(take, what=f"{wanted}", until=lambda taken: taken >= set(wanted))
    return bodies


def close_connections(servers: Servers, url: str) -> int:
    """Those to our vhost; returns how many."""
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


async def test_what_is_confirmed_is_in_the_queue_persistent_and_with_a_message_id_of_its_own(
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


async def test_a_message_that_no_queue_takes_is_in_doubt_and_the_connection_stays(
    publisher: Publisher, vhost: str
) -> None:
    with pytest.raises(InDoubt):
        await publisher.publish("nobody's key", b"[]")
    assert publisher.connected
    await publisher.publish("key", b"[]")
    assert await queued(vhost, b"[]") == [b"[]"]


async def test_without_a_connection_nothing_is_sent(vhost: str) -> None:
    publisher = Publisher(vhost, EXCHANGE, queues=[QUEUE], timeout=TIMEOUT)
    with pytest.raises(NotSent):
        await publisher.publish("key", b"[]")
    await publisher.stop()
    await publisher.start(wait=10)
    await publisher.stop()
    await publisher.stop()
    with pytest.raises(NotSent):
        await publisher.publish("key", b"[]")


async def test_a_start_beside_a_broker_that_is_away_returns_when_its_wait_is_over(servers: Servers) -> None:
    publisher = Publisher("amqp://nobody:none@127.0.0.1:1/", EXCHANGE, queues=[QUEUE], timeout=600.0)
    await asyncio.wait_for(publisher.start(wait=0.3), 30)
    assert not publisher.connected
    await publisher.stop()


async def test_a_frozen_broker_costs_one_timeout_and_then_nothing_is_sent_at_once(
    servers: Servers, hasty: Publisher, vhost: str
) -> None:
    await asyncio.to_thread(servers.rabbitmq.freeze)
    try:
        began = time.monotonic()
        async with asyncio.timeout(20):
            together = await asyncio.gather(
                *(hasty.publish("key", b"[%d]" % n) for n in range(3)), return_exceptions=True
            )
        assert [type(one) for one in together] == [InDoubt] * 3
        assert time.monotonic() - began > IMPATIENT * 0.9
        for _ in range(20):
            with pytest.raises(NotSent):
                await hasty.publish("key", b"[never]")
    finally:
        await asyncio.to_thread(servers.rabbitmq.thaw)
    await eventually(lambda: confirmed(hasty, b"[after]"), what="a confirm")
    wanted = {b"[0]", b"[1]", b"[2]", b"[after]"}  # what was in doubt did arrive
    assert set(await queued(vhost, *wanted)) == wanted


async def test_a_lost_connection_is_noticed_without_a_publish_and_made_anew(
    servers: Servers, publisher: Publisher, vhost: str
) -> None:
    connection = publisher._connection
    assert connection is not None
    # By the broker, and only when its list of connections has it: that takes seconds.
    await eventually(
        lambda: asyncio.to_thread(close_connections, servers, vhost), within=30, what="a connection closed"
    )

    async def renewed() -> bool:
        return publisher.connected and publisher._connection is not connection

    await eventually(renewed, what="another connection")
    await publisher.publish("key", b"[]")
    assert await queued(vhost, b"[]") == [b"[]"]


async def test_the_publisher_returns_after_the_broker_was_stopped_and_started(
    servers: Servers, publisher: Publisher, vhost: str
) -> None:
    await publisher.publish("key", b"[before]")
    await asyncio.to_thread(servers.rabbitmq.stop)
    with pytest.raises((NotSent, InDoubt)):
        await publisher.publish("key", b"[lost]")
    await asyncio.to_thread(servers.rabbitmq.start)
    await eventually(lambda: confirmed(publisher, b"[after]"), what="a confirm")
    assert set(await queued(vhost, b"[before]", b"[after]")) == {b"[before]", b"[after]"}


async def test_whatever_the_client_makes_of_a_broken_handshake_the_publisher_tries_again(
    monkeypatch: pytest.MonkeyPatch, servers: Servers
) -> None:
    """A proxy before a broker that is still starting hangs up in the middle: seen as StopAsyncIteration."""
    errors: list[Exception] = [StopAsyncIteration(), ValueError("half a frame")]
    connect = aio_pika.connect

    async def broken(*args: Any, **options: Any) -> Any:
        if errors:
            raise errors.pop()
        return await connect(*args, **options)

    monkeypatch.setattr(aio_pika, "connect", broken)
    publisher = Publisher(servers.rabbitmq.url, CHANGES, queues=[], timeout=1.0)
    await publisher.start()
    try:
        await asyncio.wait_for(publisher.wait_connected(), 10)
    finally:
        await publisher.stop()
    assert not errors
