"""Heartbeats on real servers: they prove the bindings, and a missing one refuses."""

import asyncio

from services.sync.heartbeat import log_path_of
from shared.entities.contract import Lane, now
from shared.messaging import topology
from shared.messaging.declare import TopologyError
from tests.rigs.postgres_writer import Rig
from tests.rigs.servers import Servers
from tests.rigs.system import eventually

LANES = [lane.value for lane in Lane]
LOG_WAYS = [log_path_of(lane) for lane in Lane]


async def stale(rig: Rig) -> list[str]:
    return rig.watch.stale()


def heard_of_the_lanes(stale: list[str]) -> bool:
    return stale == LOG_WAYS  # nobody reads the log here


async def proof(rig: Rig, within: float) -> bool | str:
    """What comes of it; why it is refused, where it is. One that began as the machine stood still may refuse a lane in
    which nothing is wrong."""
    try:
        return await rig.watch.prove(within)
    except TopologyError as refused:
        return str(refused)


async def refusal_of(rig: Rig, queue: str) -> None:
    await eventually(lambda: proof(rig, 3.0), what=f"{queue} refused", until=lambda said: repr(queue) in str(said))


async def test_a_heartbeat_goes_through_each_lane_and_is_noted(rig: Rig) -> None:
    await rig.heartbeats.start()

    async def noted() -> set[str]:
        return {row["lane"] for row in await rig.database.fetch("select lane from heartbeats")}

    await eventually(noted, what="heartbeats noted", until=lambda seen: seen == set(LANES))
    epoch = await rig.database.fetchval("select epoch from log_epochs")
    assert await rig.database.fetchval("select bool_and(epoch = $1) from heartbeats", epoch)

    async def lags() -> list[float | None]:
        return [rig.watch.lags()[lane] for lane in LANES]

    await eventually(lags, what="lags", until=lambda seen: None not in seen)
    await eventually(lambda: stale(rig), what="the lanes heard of", until=heard_of_the_lanes)

    async def told() -> set[str]:
        return set(await rig.mirror.heartbeats())

    await eventually(told, what="the mirror told", until=lambda seen: seen >= set(LANES))


async def test_bindings_are_proved_by_heartbeats_that_come_through(rig: Rig) -> None:
    await rig.heartbeats.start()

    async def read_the_log() -> None:
        while True:
            for lane in Lane:
                rig.watch.note_log(lane, now(), now())
            await asyncio.sleep(0.05)

    reading = asyncio.create_task(read_the_log())
    assert await rig.watch.prove(10.0)

    async def ready() -> bool:
        return rig.watch.readiness()[0]

    await eventually(ready, what="ready")
    reading.cancel()


async def test_a_missing_binding_refuses_and_names_the_queue(rig: Rig) -> None:
    async with rig.channel() as channel:
        queue = await channel.get_queue(topology.lane_queue(Lane.NORMAL), ensure=False)
        await queue.unbind(topology.CHANGES, Lane.NORMAL.value)
    await rig.heartbeats.start()
    await refusal_of(rig, topology.lane_queue(Lane.NORMAL))
    assert "normal" in rig.watch.stale()


async def test_a_missing_binding_of_the_log_refuses_once_its_reader_is_at_the_end(rig: Rig) -> None:
    await rig.heartbeats.start()
    said = await proof(rig, 1.0)
    assert said is not True
    assert repr(topology.LOG) not in str(said), "the reader may still be on its way"
    rig.watch.note_log_end()
    await refusal_of(rig, topology.LOG)


async def test_while_postgres_is_away_the_bindings_are_proved_all_the_same(rig: Rig, servers: Servers) -> None:
    await rig.heartbeats.start()

    async def noted() -> bool:
        return None not in [rig.watch.lags()[lane] for lane in LANES]

    await eventually(noted, what="an epoch known")
    await rig.database.close()
    rig.database = None
    await asyncio.to_thread(servers.postgres.stop)
    try:
        await eventually(lambda: proof(rig, 2.0), what="nothing refused", until=lambda said: said is False)
        await eventually(lambda: stale(rig), what="the lanes heard of", until=heard_of_the_lanes)
    finally:
        await asyncio.to_thread(servers.postgres.start)
