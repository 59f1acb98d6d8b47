"""Several broker nodes in the setting: each client continues with the next node. The nodes are proxies in front of
one broker; tests/faults/test_cluster.py has a real cluster."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import Any

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel

from deploy.local.port_check import find_free
from services.sync.writer.intake import Intake
from shared.entities.contract import Lane
from shared.entities.signal import HEARTBEAT
from shared.messaging import declare, topology
from shared.messaging.log import LogReader
from shared.messaging.publisher import InDoubt, NotSent, Publisher
from shared.messaging.subscription import Subscription
from tests.rigs.builders import change, message, order
from tests.rigs.postgres_writer import MakeRig, Rig
from tests.rigs.proxy import Mode, Proxy
from tests.rigs.servers import Servers
from tests.rigs.system import eventually


@pytest.fixture
async def nodes(servers: Servers) -> AsyncIterator[list[Proxy]]:
    found = [Proxy(servers.rabbitmq.port) for _ in range(2)]
    for node in found:
        await node.start()
    yield found
    for node in found:
        await node.stop()


def through(url: str, servers: Servers, *ports: int, query: str = "") -> str:
    return ",".join(url.replace(f":{servers.rabbitmq.port}/", f":{port}/") + query for port in ports)


async def test_first_node_that_answers_is_used(rig: Rig, servers: Servers, nodes: list[Proxy]) -> None:
    (unused_port,) = find_free(1)
    url = through(rig.settings.rabbitmq_url, servers, unused_port, nodes[0].port, nodes[1].port)
    async with await declare.connect(url):
        assert (nodes[0].accepted, nodes[1].accepted) == (1, 0)


async def test_node_that_accepts_connections_but_never_answers_is_skipped(
    rig: Rig, servers: Servers, nodes: list[Proxy]
) -> None:
    nodes[0].set(Mode.LOSE)
    url = through(rig.settings.rabbitmq_url, servers, nodes[0].port, nodes[1].port)
    async with await declare.connect(url, timeout=6.0):
        assert nodes[1].accepted == 1


async def test_publisher_continues_with_the_next_node(rig: Rig, servers: Servers, nodes: list[Proxy]) -> None:
    url = through(rig.settings.rabbitmq_url, servers, *(node.port for node in nodes))
    publisher = Publisher(url, topology.CHANGES, queues=topology.bound_queues(), timeout=3.0)
    await publisher.start(wait=10)
    try:
        for lost, mode in ((nodes[0], Mode.REFUSE), (nodes[1], Mode.LOSE)):
            accepted = lost.accepted
            assert accepted > 0
            lost.set(mode)

            async def publishes() -> bool:
                try:
                    await publisher.publish(Lane.CRITICAL, b"[]")
                except (NotSent, InDoubt):
                    return False
                return True

            await eventually(publishes, what="a publish through the other node")
            assert lost.accepted == accepted, "the publisher tried the lost node first"
            lost.set(Mode.FORWARD)
    finally:
        await publisher.stop()


async def test_publishes_after_a_nack_use_a_new_channel(rig: Rig) -> None:
    """A channel that was opened during an election of leaders nacks for ever."""
    async with rig.channel() as channel:
        full = {"x-max-length": 1, "x-overflow": "reject-publish"}
        await channel.declare_queue("full", durable=True, arguments=full)
    channels: list[AbstractChannel] = []

    class NotingConnection(aio_pika.Connection):
        def channel(self, *args: Any, **options: Any) -> AbstractChannel:
            channels.append(super().channel(*args, **options))
            return channels[-1]

    publisher = Publisher(
        rig.settings.rabbitmq_url,
        topology.CHANGES,
        queues=topology.bound_queues(),
        timeout=5.0,
        connect=partial(aio_pika.connect, connection_class=NotingConnection),
    )
    await publisher.start(wait=10)
    try:
        await publisher.publish_to_queue("full", b"[]")
        [nacking] = channels
        with pytest.raises(InDoubt):
            await publisher.publish_to_queue("full", b"[]")

        async def renewed() -> bool:
            return len(channels) > 1 and channels[-1].is_initialized

        await eventually(renewed, what="another channel")
        assert publisher.connected
        await publisher.publish(Lane.CRITICAL.value, message(change(order())))

        async def closed() -> bool:
            return nacking.is_closed

        await eventually(closed, what="the end of the old channel")
        await publisher.publish(Lane.CRITICAL.value, message(change(order())))
        with pytest.raises(InDoubt):
            await publisher.publish_to_queue("nowhere", b"[]")
        assert publisher.connected, "a returned message closed the connection"
    finally:
        await publisher.stop()


async def test_log_reader_continues_with_the_next_node_and_yields_each_entry_once(
    rig: Rig, servers: Servers, nodes: list[Proxy]
) -> None:
    url = through(rig.settings.rabbitmq_url, servers, *(node.port for node in nodes))
    changes = [change(order(items=1)) for _ in range(6)]
    bodies: list[bytes] = []

    async def read() -> None:
        async with aclosing(LogReader(url, name="test", idle_seconds=1.0).read("first")) as batches:
            async for batch in batches:
                bodies.extend(entry.body for entry in batch.entries if HEARTBEAT.encode() not in entry.body)

    async def seen() -> int:
        return len(bodies)

    reading = asyncio.create_task(read())
    try:
        for place, lost in enumerate((nodes[0], nodes[1]), 1):
            await rig.publish(changes[2 * place - 2])
            await eventually(seen, what="an entry", until=lambda count: count == 2 * place - 1)  # noqa: B023
            accepted = lost.accepted
            lost.set(Mode.LOSE if place == 1 else Mode.REFUSE)
            await rig.publish(changes[2 * place - 1])
            await eventually(seen, what="the next entry", until=lambda count: count == 2 * place)  # noqa: B023
            assert lost.accepted == accepted, "the reader tried the lost node first"
            lost.set(Mode.FORWARD)
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    assert [one.id.encode() in body for one, body in zip(changes, bodies, strict=False)] == [True] * 4


@pytest.mark.parametrize("mode", [Mode.REFUSE, Mode.LOSE])
async def test_lane_consumers_continue_with_the_next_node(
    make_rig: MakeRig, servers: Servers, nodes: list[Proxy], mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig: Rig = await make_rig()
    # Only a heartbeat notices that a connection was lost silently. Heartbeats that are too frequent close healthy ones.
    query = "?heartbeat=3" if mode is Mode.LOSE else ""
    url = through(rig.settings.rabbitmq_url, servers, *(node.port for node in nodes), query=query)
    second: Rig = Rig(rig.settings.model_copy(update={"rabbitmq_url": url}))
    await second.up()
    await second.writer.start()
    again: dict[Intake, str] = {}
    """The URL that each consumer tried first after it lost its node. The connections that a node accepts show less: an
    older connection reconnects to the same node by itself until its consumer releases it."""

    def noted(url: str, queues: list[str], *, on_lost: Any, **options: Any) -> Subscription:
        again.setdefault(on_lost.__self__, url)
        return Subscription(url, queues, on_lost=on_lost, **options)

    try:
        first = change(order())
        await rig.publish(first)
        await second.written(first)
        assert nodes[0].accepted > 0

        async def prefetches() -> list[int]:
            return sorted(second.writer.state()["prefetch"]["critical"])

        # The consumer of the first message subscribes again, to the same node.
        full = [1, second.settings.lane_prefetch]
        await eventually(prefetches, what="the full prefetch", until=lambda found: found == full)
        monkeypatch.setattr("services.sync.writer.intake.Subscription", noted)
        nodes[0].set(mode)
        more = [change(order()) for _ in range(20)]
        for one in more:
            await rig.publish(one)
        await second.written(*more, within=60)
        assert second.writer.state()["consumers"]["critical"] > 0
        assert again
        assert all(f":{nodes[1].port}/" in url for url in again.values()), "a consumer tried the lost node first"
        await rig.drained()
        await second.writer.stop()
        assert await rig.depth(topology.lane_queue(Lane.CRITICAL)) == 0
    finally:
        await second.down()
