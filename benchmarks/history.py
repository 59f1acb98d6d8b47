"""Fills PostgreSQL with the past orders of many restaurants, as the real writer would have left them.

The orders of all restaurants are interleaved by time, so that those of one restaurant are spread over the whole table.
Each order is placed, paid and completed: three changes, one current state, its items, its payment and the stock that it
held. The newest five of each restaurant are still open; one in 20 is cancelled, one in 40 refunded, one in 50 deleted.

The rows follow the declarations in `shared/entities`, as in the real writer. COPY does not work under row-level
security, so a superuser copies them.
"""

import random
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import NAMESPACE_URL, uuid5

import asyncpg
from msgspec import Raw, Struct, structs

from services.sync.writer.upsert import DecodedChange, data_of, write_batch
from shared.entities import customer, inventory_item, menu_item, order, table
from shared.entities.change_id import change_id
from shared.entities.contract import Change, ChangeData, changed_fields, encode
from shared.entities.customer import Customer
from shared.entities.entity import Entity
from shared.entities.inventory_item import InventoryItem
from shared.entities.menu_item import MenuItem
from shared.entities.order import Order, OrderItem, OrderStatus, Payment, StockHold, payment_status
from shared.entities.table import DiningTable

DAYS = 400
_ORDERS_PER_COPY = 2_000
_DISHES = 12
_TABLES = 10
_CUSTOMERS = 20
_TAX_BASIS_POINTS = 700
_OPEN_ORDERS = 5
_STOCK_COUNTED_DAYS = 30
_WRITE_TIMEOUT_SECONDS = 30.0
"""The time limit for writing one restaurant's menu, tables, customers and stock."""
_CHANGES = (
    "restaurant_id", "change_id", "entity", "entity_id", "version", "base_change_id", "type", "source", "lane",
    "accepted_at", "traceparent", "actor", "data",
)  # fmt: skip
_INSERT_RESTAURANT = (
    "insert into restaurants (id, slug, name, currency, time_zone, cutoff_hour, tax_basis_points)"
    " values ($1, $2, $3, 'EUR', 'UTC', 4, $4)"
)


class PastRestaurant(Struct, frozen=True):
    id: str
    dishes: tuple[MenuItem, ...]
    table_ids: tuple[str, ...]
    """Half of the orders are at the first table."""
    customer_ids: tuple[str, ...]
    """Every fifth order has one of these customers."""
    stock_id: str
    """The inventory item that every third order holds."""
    user_id: str
    """The user who placed the orders."""


class History(Struct, frozen=True):
    """Describes `orders`, spread evenly over `restaurants` and over the 400 days before `until`.

    `name` determines all ids, so two histories with different names share none.
    """

    name: str
    restaurants: int
    orders: int
    until: datetime

    @property
    def orders_per_restaurant(self) -> int:
        return self.orders // self.restaurants

    @property
    def counted_at(self) -> datetime:
        """The time of the count of the stock, which already includes everything that was sold before it."""
        return self.until - timedelta(days=_STOCK_COUNTED_DAYS)

    def make_restaurants(self) -> list[PastRestaurant]:
        return [self._restaurant(number) for number in range(self.restaurants)]

    def changes(self, restaurants: Sequence[PastRestaurant]) -> Iterator[list[DecodedChange]]:
        """Yields the changes of each order, the oldest order first."""
        generator = random.Random(self.name)  # noqa: S311
        interval = timedelta(days=DAYS) / self.orders_per_restaurant
        for place in range(self.orders_per_restaurant):
            first_at = self.until - interval * (self.orders_per_restaurant - place)
            for number, restaurant in enumerate(restaurants):
                yield self._order(restaurant, place, first_at + interval * number / len(restaurants), generator)

    def _id(self, *names: object) -> str:
        return str(uuid5(NAMESPACE_URL, "/".join(map(str, ("ticketrail-history", self.name, *names)))))

    def _restaurant(self, number: int) -> PastRestaurant:
        id_, at = self._id(number), self.until - timedelta(days=DAYS)
        dishes = tuple(
            MenuItem(id=self._id(number, "dish", place), restaurant_id=id_, name=f"Dish {place}", category="Mains",
                     price=500 + 75 * place, created_at=at, updated_at=at)
            for place in range(_DISHES)
        )  # fmt: skip
        tables = tuple(self._id(number, "table", place) for place in range(_TABLES))
        customers = tuple(self._id(number, "customer", place) for place in range(_CUSTOMERS))
        return PastRestaurant(id_, dishes, tables, customers, self._id(number, "stock"), self._id(number, "user"))

    def _order(
        self, restaurant: PastRestaurant, place: int, at: datetime, generator: random.Random
    ) -> list[DecodedChange]:
        placed = _placed(restaurant, place, at, generator)
        written = [_written(order.ENTITY, placed, "created", at, actor=restaurant.user_id)]

        def add_change(event: str, minutes: int, **fields: Any) -> None:
            last, later = written[-1], at + timedelta(minutes=minutes)
            after = structs.replace(last.state, **fields, updated_at=later)
            written.append(_written(order.ENTITY, after, event, later, base=last, actor=restaurant.user_id))

        if place >= self.orders_per_restaurant - _OPEN_ORDERS:
            return written
        if place % 50 == 9:
            add_change("deleted", 5, deleted_at=at + timedelta(minutes=5))
        elif place % 20 == 7:
            add_change("status_changed", 10, status=OrderStatus.CANCELLED)
        else:
            amounts = [placed.total, -placed.total] if place % 40 == 3 else [placed.total]
            for number, amount in enumerate(amounts):
                paid_at = at + timedelta(minutes=40 + number)
                payment = Payment(id=_random_id(generator), amount=amount, method=("card", "cash")[place % 2],
                                  created_at=paid_at)  # fmt: skip
                payments = (*written[-1].state.payments, payment)
                add_change("payment_recorded", 40 + number, payments=payments,
                     payment_status=payment_status(payments, placed.total))  # fmt: skip
            add_change("status_changed", 45, status=OrderStatus.COMPLETED)
        return written


def _placed(restaurant: PastRestaurant, place: int, at: datetime, generator: random.Random) -> Order:
    items = []
    for dish in generator.sample(restaurant.dishes, 1 + place % 3):
        quantity = generator.randint(1, 3)
        items.append(OrderItem(menu_item_id=dish.id, name=dish.name, quantity=quantity, unit_price=dish.price,
                               line_total=quantity * dish.price))  # fmt: skip
    subtotal = sum(one.line_total for one in items)
    tax = (subtotal * _TAX_BASIS_POINTS + 5_000) // 10_000
    return Order(
        id=_random_id(generator),
        restaurant_id=restaurant.id,
        order_number=f"{place % 10_000:04}",
        business_day=(at - timedelta(hours=4)).date(),
        status=OrderStatus.PENDING,
        items=tuple(items),
        currency="EUR",
        subtotal=subtotal,
        tax_basis_points=_TAX_BASIS_POINTS,
        tax_amount=tax,
        tip_amount=0,
        discount_amount=0,
        deposit_used=0,
        total=subtotal + tax,
        created_at=at,
        updated_at=at,
        table_id=restaurant.table_ids[0 if place % 2 else place // 2 % _TABLES],
        customer_id=restaurant.customer_ids[place // 5 % _CUSTOMERS] if place % 5 == 0 else None,
        customer_name="Ada",
        placed_by=restaurant.user_id,
        holds=(StockHold(restaurant.stock_id, 1),) if place % 3 == 0 else (),
    )


def _random_id(generator: random.Random) -> str:
    text = f"{generator.getrandbits(128):032x}"
    return f"{text[:8]}-{text[8:12]}-4{text[13:16]}-8{text[17:20]}-{text[20:]}"


def _written(
    entity: Entity, state: Any, event: str, at: datetime, *, base: DecodedChange | None = None, actor: str | None = None
) -> DecodedChange:
    """Returns the change that the rail would have recorded. Without `base`, it creates the entity."""
    type_, version = entity.type(event), base.change.entityversion + 1 if base else 1
    before, after = encode(changed_fields(base.state if base else None, state)), encode(state)
    base_id = base.change.id if base else None
    change = Change(
        id=change_id(state.id, version, b"\0".join((type_.encode(), (base_id or "").encode(), before, after))),
        source="orders",
        type=type_,
        subject=f"{entity.name}/{state.id}",
        time=at,
        restaurantid=state.restaurant_id,
        priority=entity.lane.priority,
        entityversion=version,
        basechangeid=base_id,
        actor=actor,
        data=ChangeData(after=Raw(after), before=Raw(before)),
    )
    return DecodedChange(entity.lane, entity, change, state)


async def fill(superuser_url: str, history: History) -> list[PastRestaurant]:
    """Fills an empty, migrated database and leaves it with the statistics that autovacuum would collect."""
    connection = await asyncpg.connect(superuser_url)
    try:
        restaurants = history.make_restaurants()
        await _write_references(connection, history, restaurants)
        block: list[list[DecodedChange]] = []
        for changes in history.changes(restaurants):
            block.append(changes)
            if len(block) == _ORDERS_PER_COPY:
                await _copy(connection, block)
                block.clear()
        await _copy(connection, block)
        await connection.execute("vacuum (analyze)")
    finally:
        await connection.close()
    return restaurants


async def _write_references(connection: Any, history: History, restaurants: Sequence[PastRestaurant]) -> None:
    """Writes the restaurants and everything that their orders refer to, with the statements of the real writer."""
    at = history.until - timedelta(days=DAYS)
    for number, restaurant in enumerate(restaurants):
        await connection.execute(
            _INSERT_RESTAURANT, restaurant.id, f"{history.name}-{number}", f"Restaurant {number}", _TAX_BASIS_POINTS
        )
        common: dict[str, Any] = {"restaurant_id": restaurant.id, "created_at": at, "updated_at": at}
        states: list[tuple[Entity, Any]] = [(menu_item.ENTITY, dish) for dish in restaurant.dishes]
        states += [
            (table.ENTITY, DiningTable(id=id_, label=str(place), seats=4, **common))
            for place, id_ in enumerate(restaurant.table_ids)
        ]
        states += [(customer.ENTITY, Customer(id=id_, name="Ada", **common)) for id_ in restaurant.customer_ids]
        stock = InventoryItem(
            id=restaurant.stock_id, name="Dough", quantity=10**6, counted_at=history.counted_at, **common
        )
        states.append((inventory_item.ENTITY, stock))
        await write_batch(
            connection,
            [_written(entity, state, "created", at) for entity, state in states],
            timeout_seconds=_WRITE_TIMEOUT_SECONDS,
        )


async def _copy(connection: Any, orders: Sequence[list[DecodedChange]]) -> None:
    """Copies the orders, and their changes sorted by time, in one transaction like a batch of the writer."""
    entity = order.ENTITY
    changes = sorted((one for of_order in orders for one in of_order), key=lambda one: one.change.time)
    current = [of_order[-1] for of_order in orders]
    async with connection.transaction():
        await _copy_rows(connection, "orders", ("restaurant_id", "id", "version", "change_id"), entity.table.columns, [
            ((one.change.restaurantid, one.change.entity_id, one.change.entityversion, one.change.id), one.state)
            for one in current
        ])  # fmt: skip
        for child in entity.children:
            await _copy_rows(connection, child.name, ("restaurant_id", child.parent, "position"), child.columns, [
                ((one.change.restaurantid, one.change.entity_id, place), row)
                for one in current
                for place, row in enumerate(child.rows(one.state), 1)
            ])  # fmt: skip
        for fact in entity.facts:
            await _copy_rows(connection, fact.name, ("restaurant_id", "id", fact.parent), fact.columns, [
                ((one.change.restaurantid, row.id, one.change.entity_id), row)  # type: ignore[attr-defined]
                for one in current
                for row in fact.rows(one.state)
            ])  # fmt: skip
        await connection.copy_records_to_table(
            "changes",
            columns=_CHANGES,
            records=(
                (
                    one.change.restaurantid, one.change.id, one.entity.name, one.change.entity_id,
                    one.change.entityversion, one.change.basechangeid, one.change.type, one.change.source,
                    one.lane.value, one.change.time, one.change.traceparent, one.change.actor, data_of(one.change),
                )
                for one in changes
            ),
        )  # fmt: skip


async def _copy_rows(
    connection: Any, name: str, keys: Sequence[str], columns: Sequence[Any], rows: Sequence[Any]
) -> None:
    await connection.copy_records_to_table(
        name,
        columns=[*keys, *(column.name for column in columns)],
        records=((*key, *(column.of(row) for column in columns)) for key, row in rows),
    )
