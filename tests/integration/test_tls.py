"""TLS to each backend, by the URLs of the settings. A certificate of another authority or another host is refused."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from msgspec import Struct

from shared.entities.contract import Lane
from shared.messaging import topology
from shared.messaging.log import LogReader
from shared.messaging.management import ask
from shared.messaging.publisher import Publisher
from shared.messaging.subscription import Delivery, Subscription
from shared.mirror.connection import MirrorUnavailable
from shared.mirror.mirror import Mirror
from shared.postgres.pool import Postgres
from tests.rigs.builders import change, message, order
from tests.rigs.postgres_writer import MakeRig, Rig
from tests.rigs.servers import Servers
from tests.rigs.tls import Authority, tls_proxy

HOST = "127.0.0.1"


class Trust(Struct):
    ours: Authority
    stranger: Authority


@pytest.fixture
def trust(tmp_path: Path) -> Trust:
    return Trust(Authority(tmp_path, "ours"), Authority(tmp_path, "stranger"))


@pytest.fixture
async def rig(make_rig: MakeRig) -> Rig:
    return await make_rig()


async def test_mirror_is_reached_by_rediss_and_a_strange_certificate_is_refused(trust: Trust, servers: Servers) -> None:
    def mirror_at(port: int, authority: Authority) -> Mirror:
        url = f"rediss://{HOST}:{port}/0?ssl_ca_certs={authority.ca}"
        return Mirror(url, timeout=5.0, stale_seconds=2.0)

    async with tls_proxy(servers.redis.port, trust.ours.context(HOST)) as port:
        mirror, suspicious = mirror_at(port, trust.ours), mirror_at(port, trust.stranger)
        try:
            await mirror.check()
            assert isinstance(await mirror.restaurant_ids(), list)
            with pytest.raises(MirrorUnavailable):
                await suspicious.check()
        finally:
            await mirror.close()
            await suspicious.close()
    async with tls_proxy(servers.redis.port, trust.ours.context("mirror.example")) as port:
        mirror = mirror_at(port, trust.ours)
        try:
            with pytest.raises(MirrorUnavailable):
                await mirror.check()
        finally:
            await mirror.close()


def amqps(rig: Rig, port: int, authority: Authority) -> str:
    vhost = rig.settings.rabbitmq_url.rpartition("/")[2]
    return f"amqps://ticketrail:ticketrail@{HOST}:{port}/{vhost}?cafile={authority.ca}"


@pytest.fixture
async def broker_port(trust: Trust, servers: Servers) -> AsyncIterator[int]:
    async with tls_proxy(servers.rabbitmq.port, trust.ours.context(HOST)) as port:
        yield port


async def test_changes_are_published_and_the_log_is_read_by_amqps(rig: Rig, trust: Trust, broker_port: int) -> None:
    url, made = amqps(rig, broker_port, trust.ours), change(order(items=1))
    publisher = Publisher(url, topology.CHANGES, queues=topology.bound_queues(), timeout=5.0)
    await publisher.start(wait=10)
    try:
        assert publisher.connected
        await publisher.publish(Lane.CRITICAL.value, message(made))
    finally:
        await publisher.stop()
    async with asyncio.timeout(30), aclosing(LogReader(url, name="tls", idle_seconds=5.0).read("first")) as batches:
        async for batch in batches:
            if any(made.id.encode() in entry.body for entry in batch.entries):
                break
    suspicious = Publisher(
        amqps(rig, broker_port, trust.stranger), topology.CHANGES, queues=topology.bound_queues(), timeout=2.0
    )
    await suspicious.start(wait=1.0)
    try:
        assert not suspicious.connected
    finally:
        await suspicious.stop()


async def test_lanes_are_consumed_by_amqps(rig: Rig, trust: Trust, broker_port: int) -> None:
    """FastStream has a connection of its own kind."""
    arrived: asyncio.Queue[Delivery] = asyncio.Queue()

    def subscription(authority: Authority) -> Subscription:
        return Subscription(
            amqps(rig, broker_port, authority),
            [topology.lane_queue(Lane.CRITICAL)],
            prefetch=1,
            on_message=arrived.put_nowait,
            on_lost=lambda: None,
        )

    made = change(order(items=1))
    await rig.publish(made)
    trusted = subscription(trust.ours)
    try:
        await trusted.open()
        async with asyncio.timeout(20):
            delivery = await arrived.get()
        assert delivery.body == message(made)
        await delivery.ack()
    finally:
        await trusted.close()
    suspicious = subscription(trust.stranger)
    try:
        with pytest.raises((OSError, ssl.SSLError)):
            await suspicious.open()
    finally:
        await suspicious.close()


async def test_postgres_is_reached_with_verify_full(rig: Rig, trust: Trust, servers: Servers) -> None:
    name = rig.settings.database_url.rpartition("/")[2]

    def url(port: int, authority: Authority) -> str:
        plain = f"postgresql://ticketrail_api:ticketrail@{HOST}:{port}/{name}"
        return f"{plain}?sslmode=verify-full&sslrootcert={authority.ca}"

    async def who(url: str) -> str:
        pool = Postgres(url, rig.settings)
        try:
            async with pool.connection() as connection:
                return str(await connection.fetchval("select current_user"))
        finally:
            await pool.close()

    async with tls_proxy(servers.postgres.port, trust.ours.context(HOST), postgres=True) as port:
        assert await who(url(port, trust.ours)) == "ticketrail_api"
        with pytest.raises(ssl.SSLError):
            await who(url(port, trust.stranger))
    async with tls_proxy(servers.postgres.port, trust.ours.context("postgres.example"), postgres=True) as port:
        with pytest.raises(ssl.SSLError):
            await who(url(port, trust.ours))


async def test_management_api_is_asked_by_https(
    trust: Trust, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = urlsplit(servers.rabbitmq.management_url)
    assert plain.port is not None

    async def ask_at(port: int, authority: Authority) -> object:
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca))
        url = f"https://{plain.username}:{plain.password}@{HOST}:{port}"
        return await asyncio.to_thread(ask, url, "GET", "/api/whoami", timeout=5.0)

    async with tls_proxy(plain.port, trust.ours.context(HOST)) as port:
        assert await ask_at(port, trust.ours)
        with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
            await ask_at(port, trust.stranger)
    async with tls_proxy(plain.port, trust.ours.context("mq.example")) as port:
        with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
            await ask_at(port, trust.ours)
