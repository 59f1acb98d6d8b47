"""A peer of the drain benchmark: writes batches of 500 changes from memory into the tables, with `unnest`.

It has one connection. It reads no queue, decodes nothing and acknowledges nothing, so it is the upper bound for a
writer that does.
"""

import time

import asyncpg

from benchmarks.created_changes import created
from benchmarks.random_orders import random_order
from benchmarks.rig import BenchmarkRig
from services.sync.writer.upsert import DecodedChange, write_batch
from shared.entities import order as orders
from shared.entities.contract import Lane
from shared.entities.order import Order

_BATCH_CHANGES = 500
_BATCH_TIMEOUT_SECONDS = 10.0


async def rate(rig: BenchmarkRig, changes: int) -> float:
    """Returns how many changes it writes per second."""
    made = [_written(random_order(rig.restaurants)) for _ in range(changes)]
    url = rig.database_url("writer")
    async with asyncpg.create_pool(url, min_size=1, max_size=1) as pool, pool.acquire() as connection:
        began = time.monotonic()
        for start in range(0, changes, _BATCH_CHANGES):
            await write_batch(connection, made[start : start + _BATCH_CHANGES], timeout_seconds=_BATCH_TIMEOUT_SECONDS)
        return changes / (time.monotonic() - began)


def _written(order: Order) -> DecodedChange:
    return DecodedChange(Lane.CRITICAL, orders.ENTITY, created(orders.ENTITY, order), order)
