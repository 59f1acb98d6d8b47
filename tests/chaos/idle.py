"""Waits until no change is under way: no claim, journal, lane or retry queue holds one, nothing is pending, the
payments that a fork left out are restored, and the ledger loop has brought back what the log or PostgreSQL had lost."""

import aio_pika
import redis.asyncio

from shared.entities.contract import Lane
from shared.messaging import topology
from tests.chaos.rig import ChaosRig
from tests.chaos.stores import read_log
from tests.rigs.http_client import http_client
from tests.rigs.system import eventually

# The ledger loop sends a change again half a minute after it must have left its lane.
_TIMEOUT_SECONDS = 180.0
_STORED = "select change_id::text from changes where entity = 'order'"
# Payments that the head of their order lacks (services/sync/conflicts/forked_payments.py).
_LEFT_OUT = """
select count(*) from payments p where not exists (
    select from orders o join changes c on c.restaurant_id = o.restaurant_id and c.change_id = o.change_id,
        json_array_elements(c.data->'after'->'payments') carried
    where o.restaurant_id = p.restaurant_id and o.id = p.order_id and carried->>'id' = p.id::text
)
"""


async def wait_until_idle(rig: ChaosRig) -> None:
    """After three minutes, raises an AssertionError that names the work left."""

    async def work_left() -> dict[str, int]:
        return await unfinished_work(rig) or await _lost_by_one_side(rig)

    await eventually(work_left, within=_TIMEOUT_SECONDS, what="no work left", until=lambda found: not found)


async def _lost_by_one_side(rig: ChaosRig) -> dict[str, int]:
    logged = {one.change for one in await read_log(rig)}
    async with rig.system.database() as connection:
        stored = {row[0] for row in await connection.fetch(_STORED)}
    found = {"only in the log": len(logged - stored), "only in PostgreSQL": len(stored - logged)}
    return {name: count for name, count in found.items() if count}


async def unfinished_work(rig: ChaosRig) -> dict[str, int]:
    found: dict[str, int] = {}
    async with redis.asyncio.from_url(rig.servers.redis.url) as mirror:
        found["claims"] = int(await mirror.zcard("ticketrail:claims"))
        pending = [key async for key in mirror.scan_iter("*:pending:*")]
        found["pending"] = sum([int(await mirror.zcard(key)) for key in pending])
    for name in [one for one in rig.system.children if one.endswith("orders")]:
        async with http_client() as client:
            ready = (await client.get(f"{rig.system.urls[name]}/health/ready")).json()
        found[f"journal of {name}"] = int(ready["journal"]["depth"])
    found |= await _depths(rig)
    if not any(found.values()):
        async with rig.system.database() as connection:
            found["payments that a fork left out"] = await connection.fetchval(_LEFT_OUT)
    return {name: count for name, count in found.items() if count}


async def _depths(rig: ChaosRig) -> dict[str, int]:
    found: dict[str, int] = {}
    async with await aio_pika.connect(rig.system.rabbitmq_url) as connection:
        channel = await connection.channel()
        for lane in Lane:
            for queue in (topology.lane_queue(lane), *(topology.retry_queue(lane, step) for step in (50, 100, 200))):
                declared = await channel.declare_queue(queue, passive=True)
                found[queue] = declared.declaration_result.message_count or 0
    return found
