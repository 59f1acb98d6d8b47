"""A peer of the drain benchmark: FastStream as its documentation shows it.

The handler commits one transaction for each message and then acknowledges it. It has a pool of 20 connections, and a
prefetch of 20 to keep the pool busy. Each transaction has three prepared statements: the order under the version guard,
its items, and the change.
"""

import asyncio
import os
from typing import Any

import asyncpg
from faststream import AckPolicy, FastStream
from faststream.rabbit import Channel, RabbitBroker, RabbitMessage, RabbitQueue

from services.sync.writer.upsert import data_of
from shared.entities import registry
from shared.entities.contract import Change, decode_change, split_batch
from shared.entities.order import Order
from shared.entities.signal import signal_in


class _UndecodedBody:
    """Leaves the body as it is, because FastStream's own codec never passes a JSON body to a handler as bytes."""

    async def decode(self, message: Any) -> Any:
        return message

    async def encode(self, message: Any, serializer: Any = None) -> tuple[Any, str | None]:
        return message, None


_CONCURRENCY = 20
"""Number of connections in the pool, and of messages in flight."""
_ORDER = """
insert into orders as t (restaurant_id, id, version, change_id, order_number, business_day, status, customer_name,
    currency, subtotal, tax_basis_points, tax_amount, tip_amount, discount_amount, deposit_used, total, payment_status,
    created_at, updated_at)
values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19)
on conflict (restaurant_id, id) do update set version = excluded.version, change_id = excluded.change_id,
    status = excluded.status, updated_at = excluded.updated_at
where (excluded.version, excluded.change_id) > (t.version, t.change_id)
"""
_ITEMS = """
insert into order_items (restaurant_id, order_id, position, menu_item_id, name, quantity, unit_price, line_total,
    customizations)
select $1, $2, *, '[]' from unnest($3::int[], $4::uuid[], $5::text[], $6::int[], $7::bigint[], $8::bigint[])
on conflict do nothing
"""
_CHANGE = """
insert into changes (restaurant_id, change_id, entity, entity_id, version, type, source, lane, accepted_at, data)
values ($1, $2, 'order', $3, $4, $5, $6, 'critical', $7, $8) on conflict do nothing
"""


async def _write(connection: Any, change: Change, order: Order) -> None:
    await connection.execute(
        _ORDER, order.restaurant_id, order.id, change.entityversion, change.id, order.order_number, order.business_day,
        order.status.value, order.customer_name, order.currency, order.subtotal, order.tax_basis_points,
        order.tax_amount, order.tip_amount, order.discount_amount, order.deposit_used, order.total,
        order.payment_status.value, order.created_at, order.updated_at,
    )  # fmt: skip
    items = order.items
    await connection.execute(
        _ITEMS, order.restaurant_id, order.id, list(range(1, len(items) + 1)), [item.menu_item_id for item in items],
        [item.name for item in items], [item.quantity for item in items], [item.unit_price for item in items],
        [item.line_total for item in items],
    )  # fmt: skip
    await connection.execute(
        _CHANGE, change.restaurantid, change.id, order.id, change.entityversion, change.type, change.source,
        change.time, data_of(change),
    )  # fmt: skip


async def main() -> None:
    pool = await asyncpg.create_pool(os.environ["BENCH_DATABASE_URL"], min_size=_CONCURRENCY, max_size=_CONCURRENCY)
    broker = RabbitBroker(
        os.environ["BENCH_RABBITMQ_URL"],
        default_channel=Channel(prefetch_count=_CONCURRENCY),
        apply_types=False,
        logger=None,
    )

    @broker.subscriber(
        RabbitQueue(os.environ["BENCH_QUEUE"], declare=False, durable=True),
        channel=Channel(prefetch_count=_CONCURRENCY),
        ack_policy=AckPolicy.MANUAL,
        codec=_UndecodedBody(),
        no_reply=True,
    )
    async def write(message: RabbitMessage) -> None:
        for event in split_batch(message.body):
            if signal_in(event) is None:
                change = decode_change(event)
                async with pool.acquire() as connection, connection.transaction():
                    await _write(connection, change, registry.read(change)[1])
        await message.ack()

    await FastStream(broker, logger=None).run()


if __name__ == "__main__":
    import uvloop

    uvloop.install()
    asyncio.run(main())
