"""The worker bounds the messages that it holds by their bytes, and gives a message back at most once."""

import asyncio
from collections import Counter
from pathlib import Path

import asyncpg
import psutil
import pytest

from services.sync.writer import batches, postgres_writer
from services.sync.writer.batches import WriteBatch
from services.sync.writer.prefetch import MANY_DELIVERIES, MAX_HELD_BYTES
from shared.entities.contract import Lane, decode_change, encode
from shared.entities.order import Customization
from shared.messaging import topology
from shared.messaging.subscription import Delivery
from tests.rigs.builders import change, item, message, order
from tests.rigs.postgres_writer import MakeRig
from tests.rigs.servers import Servers
from tests.rigs.system import System, eventually, publisher_to

pytestmark = pytest.mark.timeout(600)

MIB = 1 << 20
MAX_RESIDENT_BYTES = 768 * MIB


def large(size: int) -> bytes:
    """Returns an event of about `size` bytes. As many of them as possible are items."""
    chosen = tuple(Customization(name="x" * 20, option="y" * 30) for _ in range(15))
    items = tuple(item(special_instructions="z" * 300, customizations=chosen) for _ in range(min(size // 2_000, 1_000)))
    event = encode(change(order(items=items)))
    return event.replace(b'"before":{}', b'"before":{"old":"' + b"z" * (size - len(event)) + b'"}')


async def test_a_consumer_holds_32_mib_and_gives_the_rest_back_once(make_rig: MakeRig) -> None:
    rig = await make_rig(database_timeout_seconds=120.0, lane_consumers=2)
    await rig.writer.start()
    # The consumers take the full prefetch after their first messages.
    first = [change(order(items=1)) for _ in range(20)]
    for one in first:
        await rig.publish(one)
    await rig.written(*first)
    locker = await asyncpg.connect(rig.settings.database_url)
    events = [large(MIB) for _ in range(150)]
    async with locker.transaction():
        await locker.execute("lock table orders in access exclusive mode")
        await asyncio.gather(
            *(rig.publisher.publish_to_queue(topology.lane_queue(Lane.CRITICAL), message(one)) for one in events)
        )

        async def held() -> int:
            return int(rig.writer.state()["held_bytes"]["critical"])

        await eventually(held, what="consumers that hold all they may", until=lambda found: found > MAX_HELD_BYTES)
        assert await held() <= 2 * (MAX_HELD_BYTES + 2 * MIB)
    await locker.close()
    await rig.written(*(decode_change(one) for one in events), within=120)
    await rig.all_acknowledged()
    assert rig.writer.state()["most_deliveries"] == 2
    assert rig.writer.state()["failed"] == 0


async def test_a_lane_of_large_messages_is_consumed_without_giving_one_back(make_rig: MakeRig) -> None:
    rig = await make_rig()
    events = [large(2 * MIB) for _ in range(60)]
    for one in events:
        await rig.publisher.publish_to_queue(topology.lane_queue(Lane.CRITICAL), message(one))
    await rig.writer.start()
    await rig.written(*(decode_change(one) for one in events), within=120)
    await rig.all_acknowledged()
    assert rig.writer.state()["most_deliveries"] == 1


@pytest.mark.slow  # the consumers start again several times, with a pause of over a second each time
async def test_a_message_that_breaks_its_consumer_does_not_bring_others_to_the_delivery_limit(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = await make_rig()
    deliveries: Counter[bytes] = Counter()

    def parse(lane: Lane, taken: list[Delivery]) -> WriteBatch:
        """Has a bug: one message makes it raise an error that no change of a batch causes."""
        for delivery in taken:
            deliveries[delivery.body] = max(deliveries[delivery.body], delivery.deliveries)
        if any(b"breaks its consumer" in delivery.body for delivery in taken):
            raise RuntimeError("a bug")
        return batches.parse_batch(lane, taken)

    monkeypatch.setattr(postgres_writer, "parse_batch", parse)
    made = [change(order(items=1)) for _ in range(80)]
    breaking = change(order(notes="breaks its consumer"))
    await rig.writer.start()
    for one in (*made[:40], breaking, *made[40:]):
        await rig.publish(one)
    await rig.written(*made, within=120)
    others = [count for body, count in deliveries.items() if body != message(breaking)]
    assert max(others) <= MANY_DELIVERIES + 3


@pytest.mark.slow  # it publishes and consumes more than half a gigabyte
async def test_the_worker_needs_less_than_768_mib_for_large_messages(servers: Servers, tmp_path: Path) -> None:
    # The broker of the tests blocks publishers at 1 GB, so it cannot hold many more.
    of_1_mib, of_8_mb = 500, 12
    system = System(servers, tmp_path, change_log_segment_bytes=50_000_000)
    try:
        await system.up("worker", "sync")
        await system.stop("worker")
        async with publisher_to(system, timeout_seconds=60.0) as publisher:
            for size, count in ((MIB, of_1_mib), (7_900_000, of_8_mb)):
                for _ in range(count):
                    # Only into the lane: the readers of the log bound their memory themselves.
                    await publisher.publish_to_queue(topology.lane_queue(Lane.CRITICAL), message(large(size)))
        system.start("worker")
        peak = 0

        async def left() -> int:
            nonlocal peak
            peak = max(peak, await asyncio.to_thread(resident_bytes, system.children["worker"].pid))
            async with system.database() as connection:
                stored = await connection.fetchval("select count(*) from changes where entity = 'order'")
            return of_1_mib + of_8_mb - int(stored)

        await eventually(left, within=500, what="every change in PostgreSQL", until=lambda count: count == 0)
        state = system.health("worker")["postgres_writer"]
        print(f"peak {peak / MIB:.0f} MiB, {state['most_deliveries']} deliveries")
        assert state["most_deliveries"] <= 2
        assert peak < MAX_RESIDENT_BYTES
    finally:
        for name in list(system.children):
            await system.stop(name)
        await asyncio.to_thread(servers.rabbitmq.delete_vhost, system.name)
        await asyncio.to_thread(servers.postgres.drop_database, system.name)


def resident_bytes(pid: int) -> int:
    """Returns the largest peak of the resident memory of a process and its children."""
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return max(map(_peak_bytes, (process.pid for process in processes)))


def _peak_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
