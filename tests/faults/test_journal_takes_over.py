"""The journal takes the place of RabbitMQ at once, and replies say so. It survives a kill -9, drains by itself, and
refuses orders rather than losing them. The service starts with a damaged journal. All tests use HTTP."""

import asyncio
import subprocess
from collections.abc import AsyncIterator, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec import Struct

from shared.entities.contract import now
from shared.rail.set_aside import files_aside
from tests.rigs.http_client import http_client
from tests.rigs.order_load import Load
from tests.rigs.system import PATIENT, System, eventually

pytestmark = pytest.mark.timeout(150)

PUBLISH_TIMEOUT_SECONDS = 1.0
"""The time that a frozen broker costs once. It is below two seconds, within which the journal must take over."""
CLIENT_TIMEOUT_SECONDS = 10.0
"""The time that a client waits for a reply. It is longer than a busy machine stalls."""
# PATIENT has long timeouts for the mirror, which no test here stops.
SETTINGS = {**PATIENT, "publish_timeout_seconds": PUBLISH_TIMEOUT_SECONDS}


class OrdersRig(Struct):
    """Clients of one system, and the ids of the orders that they have placed."""

    system: System
    clients: list[httpx.AsyncClient]
    home: Path
    since: datetime
    """The start of the test. Earlier orders belong to other tests, even if PostgreSQL stores them only now."""
    placed: list[str] = []

    async def place(self, count: int = 1) -> list[dict[str, Any]]:
        """Places orders at the same moment, each by another client. Every order must be accepted."""
        replies = await asyncio.gather(
            *(client.post("/api/orders", json=self.system.order_body()) for client in self.clients[:count])
        )
        found = [reply.json()["data"] for reply in replies if reply.status_code == 201]
        self.placed += [one["id"] for one in found]
        assert len(found) == count, [reply.text for reply in replies if reply.status_code != 201]
        return found

    async def health(self) -> dict[str, Any]:
        async with http_client() as client:
            found: dict[str, Any] = (await client.get(f"{self.system.urls['orders']}/health/ready")).json()
        return found

    async def journal(self) -> dict[str, Any]:
        found: dict[str, Any] = (await self.health())["journal"]
        return found

    def unconfirmed_publishes(self) -> int:
        """Returns how many publishes of the orders service got no confirm within `PUBLISH_TIMEOUT_SECONDS`."""
        return (self.system.directory / "orders.log").read_text().count("record_in_doubt")

    async def drained(self) -> None:
        await eventually(self.journal, within=40, what="an empty journal", until=lambda seen: seen["depth"] == 0)

    async def all_stored(self) -> None:
        expected = set(self.placed)

        async def stored() -> set[str]:
            async with self.system.database() as connection:
                rows = await connection.fetch("select id::text from orders where created_at >= $1", self.since)
            return {row[0] for row in rows}

        await eventually(
            stored, within=40, what="every acknowledged order stored", until=lambda found: expected <= found
        )
        assert await stored() == expected, "PostgreSQL has an order that was never acknowledged"

    async def restart(self, **settings: Any) -> None:
        self.system.start("orders", **settings)
        await self.system.ready("orders")
        await eventually(self.system.can_price, what="an orders service that knows the menu")


@pytest.fixture
async def rig(victim: System, tmp_path: Path) -> AsyncIterator[OrdersRig]:
    """A system with a journal folder of its own, and ten clients."""
    await victim.stop("orders")
    home, victim.env["TICKETRAIL_HOME"] = victim.env["TICKETRAIL_HOME"], str(tmp_path)
    clients = [victim.client() for _ in range(10)]
    for client in clients:
        client.timeout = httpx.Timeout(CLIENT_TIMEOUT_SECONDS)
    made = OrdersRig(victim, clients, tmp_path, now(), [])
    try:
        await made.restart(**SETTINGS)
        yield made
    finally:
        victim.env["TICKETRAIL_HOME"] = home
        for client in clients:
            await client.aclose()


# In `make test`, test_each_unavailable.py freezes RabbitMQ.
@pytest.mark.parametrize("how", ["kill", pytest.param("freeze", marks=pytest.mark.slow)])
async def test_the_journal_takes_every_order_while_rabbitmq_is_unavailable_and_loses_none(
    rig: OrdersRig, how: str
) -> None:
    rabbitmq = rig.system.servers.rabbitmq

    # On a busy machine the journal takes an order whose confirm comes too late. The fault must follow a batch that the
    # broker confirmed in time.
    for _ in range(20):
        if {one["durability"] for one in await rig.place(10)} == {"broker"}:
            break
    else:
        pytest.fail("the broker confirms no batch of orders in time")
    # The depth must count only the orders that follow.
    await rig.drained()
    unconfirmed_publishes = rig.unconfirmed_publishes()
    stop, start_again = (rabbitmq.kill, rabbitmq.start) if how == "kill" else (rabbitmq.freeze, rabbitmq.thaw)
    await asyncio.to_thread(stop)
    try:
        for _ in range(5):
            placed = await rig.place(10)
            assert {one["durability"] for one in placed} == {"journal"}
            assert all(one["visible"] for one in placed)
        changed = await rig.clients[0].put(f"/api/orders/{rig.placed[0]}", json={"status": "received"})
        assert (changed.status_code, changed.json()["data"]["durability"]) == (200, "journal")
        assert (await rig.journal())["depth"] == 51
        # Only the first publish waited for its confirm; all later ones went to the journal at once.
        assert rig.unconfirmed_publishes() <= unconfirmed_publishes + 1
        out = await rig.system.cli("journal", "show", "--instance", "1")
        assert "51 changes wait (51 critical)" in out, out
        output = await rig.system.cli("journal", "drain", "--instance", "1", "--json", check=False)
        assert output == "", "the command drained the journal of a running instance"

        rig.system.kill("orders")
        await rig.restart(**SETTINGS)
        assert (await rig.journal())["depth"] == 51
        assert {one["durability"] for one in await rig.place(10)} == {"journal"}
        reply = await rig.clients[0].get(f"/api/orders/{rig.placed[0]}")
        assert reply.json()["data"]["status"] == "received"
    finally:
        await asyncio.to_thread(start_again)
    await rig.drained()
    await rig.all_stored()
    assert (await rig.system.stored_orders())[rig.placed[0]] == 2


async def test_a_full_journal_refuses_with_503_and_takes_orders_again_once_drained(rig: OrdersRig) -> None:
    await rig.system.stop("orders")
    await rig.restart(journal_max_bytes=40_000)
    async with Load(rig.system, changes=False) as load:
        await load.more(10)
        await asyncio.to_thread(rig.system.servers.rabbitmq.kill)

        async def refused() -> int:
            return load.refused["POST", 503]

        try:
            await eventually(refused, within=40, what="a full journal", until=lambda count: count >= 10)
            assert (await rig.journal())["depth"] > 5
        finally:
            await asyncio.to_thread(rig.system.servers.rabbitmq.start)
        await rig.drained()
        await load.more(10)
    assert load.journaled > 5
    await load.everything_arrives()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MB for the journals, if this user may mount one. It is so large that the load alone cannot
    fill it while the broker starts: without a reserve, a journal that has filled its disk cannot be drained."""
    folder = tmp_path / "small" / "journal"
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], check=False)
    if mounted.returncode:
        # Only root may mount a file system. The test above covers a full journal by a setting instead.
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(file: Path) -> None:
    with file.open("wb", buffering=0) as filler:
        try:
            while True:
                filler.write(bytes(1 << 20))
        except OSError:
            pass  # less than 1 MiB is left
        try:
            while True:
                filler.write(bytes(4096))
        except OSError:
            pass


@pytest.mark.parametrize("reserve", [4 << 20, 0], ids=["with a reserve", "to the last byte"])
async def test_a_full_disk_refuses_orders_and_takes_them_again_when_it_has_room(
    rig: OrdersRig, small_disk: Path, reserve: int
) -> None:
    await rig.system.stop("orders")
    await rig.restart(home=small_disk.parent, journal_reserve_bytes=reserve)
    async with Load(rig.system, changes=False) as load:
        await load.more(10)
        await asyncio.to_thread(rig.system.servers.rabbitmq.kill)
        try:
            await load.more(10)
            await asyncio.to_thread(fill, small_disk / "filler")

            async def refused() -> int:
                return load.refused["POST", 503] + load.unknown

            await eventually(refused, within=40, what="a full disk", until=lambda count: count >= 20)
            if reserve:
                assert load.unknown == 0, "an order is in doubt although nothing was written"
            (small_disk / "filler").unlink()
            await load.more(10)
        finally:
            await asyncio.to_thread(rig.system.servers.rabbitmq.start)
        await rig.drained()
        await load.more(10)
    await load.everything_arrives()


async def test_a_service_with_a_damaged_journal_starts_and_drains_all_intact_entries(rig: OrdersRig) -> None:
    rabbitmq, path = rig.system.servers.rabbitmq, rig.home / "journal" / "orders-1.sqlite"
    await asyncio.to_thread(rabbitmq.kill)
    try:
        for _ in range(4):
            await rig.place(10)
        rig.system.kill("orders")
        flip_bit(path, rig.placed[17])
        await rig.restart(**SETTINGS)
        journal = await rig.journal()
        assert (journal["depth"], journal["damaged"], journal["set_aside"]) == (39, 1, 1)
    finally:
        await asyncio.to_thread(rabbitmq.start)
    await rig.drained()
    async with http_client() as client:
        metrics = (await client.get(f"{rig.system.urls['orders']}/metrics")).text
    assert "ticketrail_journal_damaged 1.0" in metrics
    assert "ticketrail_journal_files_aside 1.0" in metrics
    assert len(files_aside(path)) == 1
    log = (rig.system.directory / "orders.log").read_text()
    assert "journal_set_aside" in log
    assert rig.placed[17] in log
    lost = rig.placed.pop(17)
    await rig.all_stored()
    assert lost not in await rig.system.stored_orders()


def flip_bit(path: Path, order: str) -> None:
    """Flips a bit of this order's event wherever it is stored: in the journal file or in its write-ahead log."""
    for file in (path, path.with_name(f"{path.name}-wal")):
        data, at = bytearray(file.read_bytes()), -1
        while (at := data.find(f'"id":"{order}","restaurant_id"'.encode(), at + 1)) >= 0:
            data[at + 10] ^= 1
        file.write_bytes(bytes(data))
