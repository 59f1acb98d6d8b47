"""Heartbeats on real servers: they prove the bindings, and the start fails if a binding is missing."""

import asyncio
from datetime import timedelta
from itertools import count
from uuid import uuid4

from services.sync.heartbeat import log_path_of
from shared.entities.contract import Lane, now
from shared.entities.signal import HEARTBEAT, Signal, encode_signal
from shared.messaging import topology
from shared.messaging.declare import TopologyError
from tests.rigs.postgres_writer import Rig
from tests.rigs.servers import Servers
from tests.rigs.system import eventually

LANES = [lane.value for lane in Lane]
LOG_PATHS = [log_path_of(lane) for lane in Lane]


async def stale(rig: Rig) -> list[str]:
    return rig.watch.stale()


def lanes_are_fresh(stale: list[str]) -> bool:
    # The paths into the log stay stale, because these tests do not read the log.
    return stale == LOG_PATHS


async def proof(rig: Rig, within: float) -> bool | str:
    """Returns the result of the check of the bindings, or the reason of its refusal. If the machine stalls, the check
    may refuse a healthy lane."""
    try:
        return await rig.watch.prove(within)
    except TopologyError as refused:
        return str(refused)


async def refusal_of(rig: Rig, queue: str) -> None:
    await eventually(lambda: proof(rig, 3.0), what=f"{queue} refused", until=lambda result: repr(queue) in str(result))


async def test_heartbeat_goes_through_each_lane_and_is_stored(rig: Rig) -> None:
    await rig.heartbeats.start()

    async def stored() -> set[str]:
        return {row["lane"] for row in await rig.database.fetch("select lane from heartbeats")}

    await eventually(stored, what="heartbeats in PostgreSQL", until=lambda seen: seen == set(LANES))

    async def lags() -> list[float | None]:
        return [rig.watch.lags()[lane] for lane in LANES]

    await eventually(lags, what="the lag of every lane", until=lambda seen: None not in seen)
    await eventually(lambda: stale(rig), what="fresh heartbeats in every lane", until=lanes_are_fresh)


async def test_heartbeats_that_come_through_prove_the_bindings(rig: Rig) -> None:
    await rig.heartbeats.start()

    async def read_the_log() -> None:
        for offset in count():
            for lane in Lane:
                for id_ in rig.watch.sent_ids:
                    rig.watch.arrived_in_log(lane, id_, offset)
            await asyncio.sleep(0.05)

    reading = asyncio.create_task(read_the_log())
    assert await rig.watch.prove(10.0)

    async def ready() -> bool:
        return rig.watch.readiness()[0]

    await eventually(ready, what="a worker that is ready")
    reading.cancel()


async def test_a_worker_stays_ready_after_another_one_whose_clock_is_hours_ahead_has_ended(rig: Rig) -> None:
    for lane in Lane:
        ahead = Signal(id=str(uuid4()), type=HEARTBEAT, time=now() + timedelta(hours=2), lane=lane.value)
        await rig.publisher.publish(lane.value, encode_signal(ahead))

    async def of_the_other() -> int:
        return int(await rig.database.fetchval("select count(*) from heartbeats"))

    await eventually(of_the_other, what="its last heartbeats", until=lambda count: count == len(LANES))
    # Since it has ended, no heartbeat comes.
    await eventually(lambda: stale(rig), what="stale lanes", until=lambda stale: set(LANES) <= set(stale))
    await rig.heartbeats.start()
    await eventually(lambda: stale(rig), what="fresh heartbeats in every lane", until=lanes_are_fresh)

    async def last() -> list[float]:
        rows = await rig.database.fetch("select extract(epoch from sent_at - now())::float8 from last_heartbeats")
        return [row[0] for row in rows]

    await eventually(last, what="heartbeats of the remaining worker", until=lambda ahead: max(ahead) < 3600.0)


async def test_missing_binding_is_refused_and_names_the_queue(rig: Rig) -> None:
    async with rig.channel() as channel:
        queue = await channel.get_queue(topology.lane_queue(Lane.NORMAL), ensure=False)
        await queue.unbind(topology.CHANGES, Lane.NORMAL.value)
    await rig.heartbeats.start()
    await refusal_of(rig, topology.lane_queue(Lane.NORMAL))
    assert "normal" in rig.watch.stale()


async def test_missing_binding_of_the_log_is_refused_once_the_log_reader_is_at_the_end(rig: Rig) -> None:
    await rig.heartbeats.start()
    result = await proof(rig, 1.0)
    assert result is not True
    assert repr(topology.LOG) not in str(result), "the check refused the log before the reader was at its end"
    rig.watch.note_log_end()
    await refusal_of(rig, topology.LOG)


async def test_bindings_are_proved_while_postgres_is_unavailable(rig: Rig, servers: Servers) -> None:
    await rig.heartbeats.start()

    async def stored() -> bool:
        return None not in [rig.watch.lags()[lane] for lane in LANES]

    await eventually(stored, what="heartbeats in PostgreSQL")
    await rig.database.close()
    rig.database = None
    await asyncio.to_thread(servers.postgres.stop)
    try:
        await eventually(lambda: proof(rig, 2.0), what="no refusal", until=lambda result: result is False)
        await eventually(lambda: stale(rig), what="fresh heartbeats in every lane", until=lanes_are_fresh)
    finally:
        await asyncio.to_thread(servers.postgres.start)
