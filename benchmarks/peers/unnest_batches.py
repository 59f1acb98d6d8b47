"""A peer of the drain benchmark: batches of 500 by unnest straight into the tables, out of memory, one connection: no
queue, no decoding, no acknowledging. The bound of what a writer behind a queue can reach."""

import random
import time
from typing import Any
from uuid import UUID

import asyncpg
import msgspec

from shared.entities import order as orders
from shared.entities.contract import Change, ChangeData, Lane, change_id, encode, now
from shared.entities.order import Order, OrderItem, Status
from shared.postgres.changes import Written, write_batch

_BATCH = 500


async def rate(rig: Any, changes: int) -> float:
    """Changes a second."""
    made = [_written(change(rig.restaurants)) for _ in range(changes)]
    connection = await asyncpg.connect(rig.database_url("writer"))
    try:
        began = time.monotonic()
        for start in range(0, changes, _BATCH):
            await write_batch(connection, made[start : start + _BATCH], patience=10.0)
        return changes / (time.monotonic() - began)
    finally:
        await connection.close()


def change(restaurants: Any) -> Change:
    """A new order with three items, as the orders service makes it."""
    restaurant = random.choice(restaurants)  # noqa: S311
    id_, at = str(UUID(int=random.getrandbits(128), version=4)), now()
    items = tuple(
        OrderItem(menu_item_id=dish, name="Dish", quantity=2, unit_price=500, line_total=1000)
        for dish in restaurant.menu_item_ids[:3]
    )
    state = Order(
        id=id_,
        restaurant_id=restaurant.id,
        order_number="0001",
        business_day=at.date(),
        status=Status.PENDING,
        items=items,
        currency="EUR",
        subtotal=3000,
        tax_basis_points=700,
        tax_amount=210,
        tip_amount=0,
        discount_amount=0,
        deposit_used=0,
        total=3210,
        created_at=at,
        updated_at=at,
        customer_name="Ada",
    )
    after = encode(state)
    return Change(
        id=change_id(id_, 1, after),
        source="orders",
        type=orders.ENTITY.type("created"),
        subject=f"order/{id_}",
        time=at,
        restaurantid=restaurant.id,
        priority=10,
        entityversion=1,
        data=ChangeData(after=msgspec.Raw(after)),
    )


def _written(made: Change) -> Written:
    return Written(Lane.CRITICAL, orders.ENTITY, made, orders.ENTITY.decode(made))
