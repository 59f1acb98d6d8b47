"""A broker behind 4 Mbit/s is slow, and not unavailable: the journal drains, and new orders are confirmed meanwhile."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from shared.entities.contract import Lane, encode
from shared.messaging import topology
from shared.messaging.publisher import Publisher
from shared.rail.drain import Drainer
from shared.rail.journal import Journal
from shared.rail.record import MAX_MESSAGE_BYTES, Durability, Recorder
from tests.rigs import builders
from tests.rigs.http_client import http_client
from tests.rigs.proxy import FOUR_MBIT, Mode, Proxy
from tests.rigs.rail.vhost import VhostRail, open_vhost
from tests.rigs.restaurant import made, register_restaurant
from tests.rigs.servers import Servers
from tests.rigs.system import System, eventually

pytestmark = pytest.mark.timeout(120)

LANE = Lane.CRITICAL
MIN_COPIES = 1
MAX_COPIES = 2
"""A change whose publish was in doubt is published again."""


class SlowRig:
    """An instance of the orders service behind a narrow link: a recorder, its journal, and the drainer of that."""

    def __init__(self, vhost: VhostRail, proxy: Proxy, port: int, folder: Path) -> None:
        url = vhost.url.replace(f":{port}/", f":{proxy.port}/")
        self.vhost, self.proxy = vhost, proxy
        self.publisher, self.journal_publisher = (
            Publisher(url, topology.CHANGES, queues=topology.bound_queues(), timeout=1.5) for _ in range(2)
        )
        self.journal = Journal(folder / "orders-9.sqlite", instance=9, max_bytes=1 << 28)
        self.recorder = Recorder(self.publisher, self.journal, max_publishes=1)
        self.drainer = Drainer(self.journal, self.journal_publisher)

    async def up(self) -> None:
        await self.journal.open()
        for publisher in (self.publisher, self.journal_publisher):
            await publisher.start(wait=20)
        self.proxy.set(Mode.FORWARD, bandwidth=FOUR_MBIT)

    async def down(self) -> None:
        await self.drainer.stop()
        for publisher in (self.publisher, self.journal_publisher):
            await publisher.stop()
        await self.journal.close()

    async def drained(self) -> None:
        async def left() -> int:
            return self.journal.depth

        await eventually(left, within=60, what="an empty journal", until=lambda depth: not depth)

    async def copies(self, at_least: int) -> Counter[str]:
        """Returns change id -> number of its copies in the lane."""
        self.proxy.set(Mode.FORWARD)
        found: Counter[str] = Counter()

        async def changes() -> int:
            found.update(change.id for message in await self.vhost.queued() for change in message)
            return len(found)

        await eventually(changes, within=30, what=f"{at_least} changes", until=lambda count: count >= at_least)
        return found


@pytest.fixture
async def rig(servers: Servers, tmp_path: Path) -> AsyncIterator[SlowRig]:
    proxy = Proxy(servers.rabbitmq.port)
    await proxy.start()
    async with open_vhost(servers, tmp_path) as vhost:
        made = SlowRig(await vhost.instance(publisher=False), proxy, servers.rabbitmq.port, tmp_path)
        try:
            await made.up()
            yield made
        finally:
            await made.down()
            await proxy.stop()


def small() -> bytes:
    return encode(builders.change(builders.order(items=1)))


def large(size: int) -> bytes:
    event = encode(builders.change(builders.order(items=1)))
    return event.replace(b'"before":{}', b'"before":{"x":"' + b"y" * size + b'"}')


async def test_the_journal_drains_over_a_slow_link_while_new_orders_are_confirmed(rig: SlowRig) -> None:
    events = [encode(builders.change(builders.order(items=60))) for _ in range(150)]
    assert sum(map(len, events)) > 3 * FOUR_MBIT, "the link must need seconds for the journal"
    await rig.journal.append([(LANE, event) for event in events])
    connections = rig.proxy.accepted
    rig.drainer.start()
    recorded: list[Any] = []
    while rig.journal.depth:
        recorded.append(await rig.recorder.record(LANE, small()))
    assert set(recorded) == {Durability.BROKER}
    assert len(recorded) > 10
    assert rig.proxy.accepted == connections, "a connection was cut while its bytes flowed"
    copies = await rig.copies(len(events) + len(recorded))
    assert len(copies) == len(events) + len(recorded)
    assert set(copies.values()) <= {MIN_COPIES, MAX_COPIES}


async def test_large_changes_wait_in_the_journal_and_do_not_delay_new_orders(rig: SlowRig) -> None:
    """A change of 1 MB needs two seconds, which is longer than a publish may wait."""
    connections = rig.proxy.accepted
    changes = [large(1_000_000) for _ in range(3)]
    assert all(len(change) > MAX_MESSAGE_BYTES for change in changes)
    found = await asyncio.gather(*(rig.recorder.record(LANE, change) for change in changes))
    assert found == [Durability.JOURNAL] * 3
    rig.drainer.start()
    recorded = []
    while rig.journal.depth:
        recorded.append(await rig.recorder.record(LANE, small()))
    assert set(recorded) == {Durability.BROKER}
    assert rig.proxy.accepted == connections
    copies = await rig.copies(3 + len(recorded))
    assert set(copies.values()) == {1}


async def test_more_orders_than_a_slow_link_carries_go_to_the_journal_and_all_arrive(rig: SlowRig) -> None:
    events = [encode(builders.change(builders.order(items=60))) for _ in range(150)]
    found = Counter(await asyncio.gather(*(rig.recorder.record(LANE, event) for event in events)))
    assert found.total() == 150
    assert found[Durability.JOURNAL] > found[Durability.BROKER] > 0
    rig.drainer.start()
    await rig.drained()
    copies = await rig.copies(150)
    assert len(copies) == 150
    assert set(copies.values()) <= {MIN_COPIES, MAX_COPIES}


async def test_a_large_order_over_the_api_is_durable_in_the_journal_and_small_ones_in_the_broker(
    servers: Servers, system: System
) -> None:
    restaurant = await register_restaurant(system)
    dish = await restaurant.dish()
    proxy = Proxy(servers.rabbitmq.port)
    await proxy.start()
    url = system.rabbitmq_url.replace(f":{servers.rabbitmq.port}/", f":{proxy.port}/")
    one = {"menu_item_id": dish["id"], "quantity": 1}
    try:
        async with (
            system.another_orders("slow-orders", rabbitmq_url=url) as orders,
            http_client(base_url=orders, headers={"Authorization": f"Bearer {restaurant.token}"}, timeout=30) as client,
        ):

            async def place(items: list[dict[str, Any]]) -> dict[str, Any]:
                placed: dict[str, Any] = made(await client.post("/api/orders", json={"items": items}))
                return placed

            async def knows_the_dish() -> bool:
                return bool(await place([one]))

            async def journaled() -> int:
                return int((await client.get("/health/ready")).json()["journal"]["depth"])

            await eventually(knows_the_dish, what="an orders service that knows the dish")
            proxy.set(Mode.FORWARD, bandwidth=FOUR_MBIT)
            large = [await place([{**one, "special_instructions": "x" * 2_000}] * 400) for _ in range(2)]
            assert {order["durability"] for order in large} == {"journal"}
            assert await journaled()
            small = [await place([one]) for _ in range(10)]
            assert {order["durability"] for order in small} == {"broker"}
            await eventually(journaled, within=60, what="an empty journal", until=lambda depth: depth == 0)

            async def synced() -> set[str]:
                found = [(await client.get(f"/api/orders/{order['id']}")).json()["data"] for order in (*large, *small)]
                return {order["sync"]["state"] for order in found}

            await eventually(synced, within=60, what="synced orders", until=lambda states: states == {"synced"})
    finally:
        await proxy.stop()
