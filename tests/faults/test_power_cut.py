"""The power of the servers' machine fails. RabbitMQ flushes a quorum queue before it confirms, a stream never
(https://www.rabbitmq.com/docs/streams#data-safety): the change log loses its end, and gives the same offsets again.
Redis flushes once a second, so the mirror loses its end too. PostgreSQL loses nothing."""

import asyncio
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from shared.messaging import declare
from shared.messaging.log import BrokenPosition, LogReader, Start
from shared.messaging.position import LogPosition
from shared.messaging.recovery import when_ready
from tests.rigs.builders import change, order
from tests.rigs.notifier import NotifierRig
from tests.rigs.power_cut import OwnBroker, PowerCut
from tests.rigs.servers import Servers
from tests.rigs.servers.processes import prepare
from tests.rigs.system import System, eventually

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
async def broker(servers: Servers) -> AsyncIterator[OwnBroker]:
    folder = Path(tempfile.mkdtemp(prefix="ticketrail-power-"))
    own = OwnBroker(servers, folder)
    await asyncio.to_thread(own.rabbitmq.start)
    try:
        yield own
    finally:
        await asyncio.to_thread(own.rabbitmq.discard)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
async def rig(broker: OwnBroker, tmp_path: Path) -> AsyncIterator[NotifierRig]:
    rig = NotifierRig(broker, tmp_path)
    await rig.make()
    await broker.streams_on_disk()
    yield rig
    await rig.clean()


async def test_screens_get_all_new_changes_or_a_resync_after_a_power_cut(broker: OwnBroker, rig: NotifierRig) -> None:
    notifier = await rig.notifier()
    async with notifier.screen() as live, notifier.screen() as early, notifier.screen() as late:
        await rig.publish_each(*(change(order(items=1)) for _ in range(5)))
        kept = (await early.first(5))[-1].id
        await broker.copy_streams()
        await rig.publish_each(*(change(order(items=1)) for _ in range(40)))
        lost = [event.id for event in (await late.first(45))[5:]]
        await live.first(45)
        await broker.cut_power()
        await when_ready(rig.url, declare.log_exists, within=60)
        # More messages than were lost: the offsets of all lost cursors exist again.
        fresh = [change(order(items=1)) for _ in range(60)]
        await rig.publish_each(*fresh)
        wanted = [one.entity_id for one in fresh]

        # A screen that stays connected to the notifier misses nothing, and needs no resync.
        events = await live.first(105)
        assert [event.data.get("orderID", event.name) for event in events[45:]] == wanted

    for back in (notifier, await rig.notifier()):
        async with back.screen(after=kept) as screen:
            events = await screen.first(len(wanted))
            assert [event.data.get("orderID", event.name) for event in events] == wanted
        for cursor in (lost[0], lost[20], lost[-1]):
            async with back.screen(after=cursor) as screen:
                (resync,) = await screen.first(1)
                assert (resync.name, resync.data["reason"]) == ("resync", "truncated")
        # After its resync, a screen continues from there.
        await rig.publish_each(last := change(order(items=1)))
        wanted.append(last.entity_id)
        async with back.screen(after=resync.id) as screen:
            assert (await screen.first(1))[0].data["orderID"] == last.entity_id


async def test_reader_continues_after_the_newest_known_entry_that_a_power_cut_left(
    broker: OwnBroker, rig: NotifierRig
) -> None:
    known: list[LogPosition] = []
    bodies: list[bytes] = []
    broken: list[BrokenPosition] = []

    async def older() -> Sequence[Start]:
        return known[::-1]

    async def follow() -> None:
        reader = LogReader(rig.url, name="test", idle_seconds=1.0)
        async for batch in reader.read("first", fallbacks=older):
            if batch.broken is not None:
                broken.append(batch.broken)
            known.extend(entry.position for entry in batch.entries)
            bodies.extend(entry.body for entry in batch.entries)

    async def has_read() -> list[bytes]:
        return bodies

    following = asyncio.create_task(follow())
    sent = [b"[%d]" % number for number in range(30)]
    await rig.send(*sent[:10])
    await eventually(has_read, what="the first entries", until=lambda found: found == sent[:10])
    last_kept = known[-1]
    await broker.copy_streams()
    await rig.send(*sent[10:20])
    await eventually(has_read, what="the entries that will be lost", until=lambda found: found == sent[:20])
    await broker.cut_power()
    await when_ready(rig.url, declare.log_exists, within=60)
    await rig.send(*sent[20:])
    await eventually(has_read, within=60, what="the new entries", until=lambda found: found == sent)
    assert [(one.reason, one.back_to) for one in broken] == [("truncated", last_kept)]
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)


@pytest.fixture
async def system(tmp_path: Path) -> AsyncIterator[System]:
    """A system on servers of its own, local processes whose files the test puts back."""
    servers = await asyncio.to_thread(prepare)
    try:
        await asyncio.to_thread(servers.start_all)
        system = System(servers, tmp_path)
        await system.up()
        yield system
        await system.down()
    finally:
        await asyncio.to_thread(servers.stop_all)


async def test_a_mirror_that_lost_its_end_shows_the_states_of_postgres_and_forks_nothing(
    system: System, tmp_path: Path
) -> None:
    cut = PowerCut(system.servers, tmp_path / "power-cut")

    async def create() -> dict[str, Any]:
        async with system.client() as client:
            reply = await client.post("/api/orders", json=system.order_body())
        assert reply.status_code == 201, reply.text
        made: dict[str, Any] = reply.json()["data"]
        return made

    async def read() -> tuple[int, str]:
        async with system.client() as client:
            data = (await client.get(f"/api/orders/{order_id}")).json()["data"]
        return data["version"], data["sync"]["state"]

    async def change(notes: str) -> int:
        async with system.client() as client:
            reply = await client.put(f"/api/orders/{order_id}", json={"notes": notes})
        unanswered.extend([notes] * (reply.status_code == 504))
        assert reply.status_code == 200, reply.text
        return int(reply.json()["data"]["version"])

    async def stored_version() -> int | None:
        return (await system.stored_orders()).get(order_id)

    unanswered: list[str] = []
    """Changes that were answered 504, so they may count."""
    order_id = (await create())["id"]
    await eventually(read, what="a synced order", until=lambda seen: seen == (1, "synced"))
    await asyncio.to_thread(cut.copy)
    assert await change("acknowledged") == 2
    numbers = [(await create())["order_number"] for _ in range(20)]
    await eventually(stored_version, what="version 2 in PostgreSQL", until=lambda version: version == 2)

    await asyncio.to_thread(cut.cut)
    # From now on, somebody tries to change the order. It is refused until the mirror is warm again. A change that is
    # accepted then follows version 2.
    trying = asyncio.create_task(eventually(lambda: change("after the cut"), what="an accepted change", within=150))
    await asyncio.to_thread(cut.return_power)
    for name in system.children:
        await system.ready(name)
    numbers += [(await create())["order_number"] for _ in range(5)]
    accepted = await trying
    assert 3 <= accepted <= 3 + len(unanswered)
    numbers += [(await create())["order_number"] for _ in range(5)]
    await eventually(read, what="the synced order", until=lambda seen: seen == (accepted, "synced"))
    assert len(set(numbers)) == len(numbers)

    # The ledger loop publishes the lost changes to the log again, and every store has every change once.
    async def differences() -> int:
        printed = json.loads(await system.cli("full-sync", "--verify", "--json", check=False))
        return len(printed["differences"]) + printed["pending"] + (not printed["compared"])

    await eventually(differences, what="equal stores", within=90, until=lambda count: count == 0)
    async with system.database() as connection:
        assert await connection.fetchval("select count(*) from conflicts") == 0
        repeated = "select array_agg(order_number) from orders group by order_number having count(*) > 1"
        assert await connection.fetch(repeated) == []
