"""The power of the broker's machine fails. RabbitMQ flushes a quorum queue before it confirms, a stream never
(https://www.rabbitmq.com/docs/streams#data-safety): the change log loses its end, and gives the same offsets again."""

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from shared.messaging import declare
from shared.messaging.log import BrokenPosition, LogReader, Start
from shared.messaging.position import LogPosition
from shared.messaging.recovery import when_ready
from tests.rigs.builders import change, order
from tests.rigs.notifier import NotifierRig
from tests.rigs.power_cut import OwnBroker
from tests.rigs.servers import Servers
from tests.rigs.system import eventually

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
