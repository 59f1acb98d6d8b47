"""Creates random orders for loads that do not go through the API."""

import random
from collections.abc import Sequence
from uuid import UUID

from benchmarks.created_changes import created
from benchmarks.restaurants import SeededRestaurant
from shared.entities import order as orders
from shared.entities.contract import encode, now
from shared.entities.order import Order, OrderItem, OrderStatus


def random_order(restaurants: Sequence[SeededRestaurant]) -> Order:
    """Returns a new order with three items at any of `restaurants`."""
    restaurant = random.choice(restaurants)  # noqa: S311
    at = now()
    items = tuple(
        OrderItem(menu_item_id=dish, name="Dish", quantity=2, unit_price=500, line_total=1000)
        for dish in restaurant.menu_item_ids[:3]
    )
    return Order(
        id=str(UUID(int=random.getrandbits(128), version=4)),
        restaurant_id=restaurant.id,
        order_number="0001",
        business_day=at.date(),
        status=OrderStatus.PENDING,
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


def encoded_orders(restaurants: Sequence[SeededRestaurant], count: int) -> list[bytes]:
    """Returns `count` encoded changes, each of which creates a random order."""
    return [encode(created(orders.ENTITY, random_order(restaurants))) for _ in range(count)]
