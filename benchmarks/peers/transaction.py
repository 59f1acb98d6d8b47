"""The common part of the Litestar peers of the accept benchmark: they store an order in one PostgreSQL transaction.

Both use the server (Granian, one worker, uvloop), authorization, token cache, validation, pricing, in-memory menu and
reply of the orders service. One transaction over a pool of 20 with prepared statements writes the items, a sync log
row, the number counter and the order. A unique index provides idempotency: a repeated key gets the first order again.
Traces and rate limits are off.
"""

import json
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import msgspec
from litestar import Litestar, get
from litestar.datastructures import State
from litestar.types import ASGIApp

from services.orders.menu import MenuBook
from services.orders.pricing import priced_items, totals
from services.orders.requests import PlaceOrder
from services.orders.views import PENDING, state_view
from shared.entities.contract import Head, encode, now
from shared.entities.menu_item import MenuItem
from shared.entities.order import Order, OrderItem, OrderStatus
from shared.http.authorization import authorization
from shared.http.bodies import read_body
from shared.http.call import Call
from shared.http.error_replies import EXCEPTION_HANDLERS
from shared.http.open_bodies import OpenBodies
from shared.http.replies import Reply, success
from shared.lifecycle import freeze_memory
from shared.observability.metrics import HttpMetrics, Metrics
from shared.observability.tracing import Tracer
from shared.restaurants import Restaurant
from shared.security.tokens import Tokens
from shared.settings import Settings

SCHEMA = """
create table if not exists counters (restaurant_id uuid, day date, last int not null, primary key (restaurant_id, day));
create table if not exists orders (
    restaurant_id uuid, id uuid, order_number text, business_day date, status text, table_id uuid, customer_name text,
    currency text, subtotal bigint, tax_basis_points int, tax_amount bigint, tip_amount bigint, discount_amount bigint,
    deposit_used bigint, total bigint, idempotency_key text, placed_by text, created_at timestamptz,
    updated_at timestamptz, primary key (restaurant_id, id));
create unique index if not exists orders_by_key on orders (restaurant_id, placed_by, idempotency_key)
    where idempotency_key is not null;
create table if not exists order_items (
    restaurant_id uuid, order_id uuid, position int, menu_item_id uuid, name text, quantity int, unit_price bigint,
    line_total bigint, primary key (restaurant_id, order_id, position));
create table if not exists sync_log (
    id bigint generated always as identity primary key, restaurant_id uuid, order_id uuid, version int, state text,
    created_at timestamptz default now());
"""
POOL_SIZE = 20

_COUNT = (
    "insert into counters as c values ($1, $2, 1) on conflict (restaurant_id, day) do update set last = c.last + 1"
    " returning last"
)
_ORDER = (
    "insert into orders values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19)"
)
_ITEMS = (
    "insert into order_items select $1, $2, * from unnest($3::int[], $4::uuid[], $5::text[], $6::int[], $7::bigint[],"
    " $8::bigint[])"
)
_LOG = "insert into sync_log (restaurant_id, order_id, version, state) values ($1, $2, 1, 'pending')"
_EARLIER = (
    "select id::text, order_number, business_day, status, table_id::text, customer_name, currency, subtotal,"
    " tax_basis_points, tax_amount, tip_amount, discount_amount, deposit_used, total, placed_by, created_at, updated_at"
    " from orders where restaurant_id = $1 and placed_by = $2 and idempotency_key = $3"
)
_EARLIER_ITEMS = (
    "select menu_item_id::text, name, quantity, unit_price, line_total from order_items"
    " where restaurant_id = $1 and order_id = $2 order by position"
)

Resources = Callable[[Litestar], AbstractAsyncContextManager[None]]


async def priced_order(request: Call) -> Order:
    """Returns the validated and priced order, without a number yet. Raises the same errors as the orders service."""
    identity = request.identity
    requested = read_body(await request.whole_body(), PlaceOrder)
    book: MenuBook = request.app.state["books"][identity.tenant]
    restaurant, at = book.restaurant, now()
    items = priced_items(requested.items, book.menu)
    sums = totals(
        items,
        basis_points=restaurant.tax_basis_points,
        tip=requested.tip_amount,
        discount=requested.discount_amount,
        deposit=requested.deposit_used,
    )
    return Order(
        id=str(uuid4()),
        restaurant_id=restaurant.id,
        order_number="",
        business_day=restaurant.business_day(at),
        status=OrderStatus.PENDING,
        items=items,
        currency=restaurant.currency,
        subtotal=sums.subtotal,
        tax_basis_points=restaurant.tax_basis_points,
        tax_amount=sums.tax_amount,
        tip_amount=requested.tip_amount,
        discount_amount=requested.discount_amount,
        deposit_used=requested.deposit_used,
        total=sums.total,
        created_at=at,
        updated_at=at,
        table_id=str(requested.table_id) if requested.table_id else None,
        customer_name=requested.customer_name,
        placed_by=identity.user_id,
    )


async def store(request: Call, order: Order) -> Order:
    """Commits the order and returns it with its number; for a repeated `Idempotency-Key`, the first order."""
    pool: asyncpg.Pool = request.app.state["pool"]
    key = request.header(b"idempotency-key")
    try:
        async with pool.acquire() as connection, connection.transaction():
            return await _insert(connection, order, key)
    except asyncpg.UniqueViolationError:
        earlier = await _earlier(pool, order, key)
        if earlier is None:
            raise
        return earlier


async def _insert(connection: Any, order: Order, key: str | None) -> Order:
    items = order.items
    await connection.execute(
        _ITEMS,
        order.restaurant_id,
        order.id,
        list(range(1, len(items) + 1)),
        [item.menu_item_id for item in items],
        [item.name for item in items],
        [item.quantity for item in items],
        [item.unit_price for item in items],
        [item.line_total for item in items],
    )
    await connection.execute(_LOG, order.restaurant_id, order.id)
    # This statement comes as late as possible, because it locks the row of the counter until the commit.
    number = await connection.fetchval(_COUNT, order.restaurant_id, order.business_day)
    numbered = msgspec.structs.replace(order, order_number=f"{number:04d}")
    await connection.execute(
        _ORDER,
        order.restaurant_id,
        order.id,
        numbered.order_number,
        order.business_day,
        order.status.value,
        order.table_id,
        order.customer_name,
        order.currency,
        order.subtotal,
        order.tax_basis_points,
        order.tax_amount,
        order.tip_amount,
        order.discount_amount,
        order.deposit_used,
        order.total,
        key,
        order.placed_by,
        order.created_at,
        order.updated_at,
    )
    return numbered


async def _earlier(pool: asyncpg.Pool, order: Order, key: str | None) -> Order | None:
    """Returns the order that the caller placed with the same key, or None."""
    async with pool.acquire() as connection:
        row = await connection.fetchrow(_EARLIER, order.restaurant_id, order.placed_by, key)
        if row is None:
            return None
        items = await connection.fetch(_EARLIER_ITEMS, order.restaurant_id, row["id"])
    return Order(
        **{**row, "status": OrderStatus(row["status"])},
        restaurant_id=order.restaurant_id,
        items=tuple(OrderItem(**item) for item in items),
    )


def placed(order: Order) -> ASGIApp:
    """Returns the reply that the orders service would send."""
    return success(state_view(encode(order), Head(1, order.id), PENDING), status=201, headers={"ETag": '"1"'})


@get("/health/ready")
async def ready() -> ASGIApp:
    return Reply(b'{"status":"ready"}')


def application(place: Any, *, name: str, resources: Resources | None = None) -> Litestar:
    """Creates an app with the route handler `place`. `resources` opens its connections other than
    the PostgreSQL pool."""
    config = json.loads(Path(os.environ["BENCH_RESTAURANTS"]).read_text())
    state = State({"books": {one["id"]: _book(one) for one in config["restaurants"]}})
    tracer = Tracer(name, Settings.model_construct(trace_sample=0))

    @asynccontextmanager
    async def lifespan(app: Litestar) -> AsyncIterator[None]:
        async with asyncpg.create_pool(
            os.environ["BENCH_DATABASE_URL"], min_size=POOL_SIZE, max_size=POOL_SIZE
        ) as pool:
            await pool.execute(SCHEMA)
            app.state["pool"] = pool
            freeze_memory()
            yield

    return Litestar(
        route_handlers=[place, ready],
        state=state,
        middleware=[
            authorization(
                Tokens(config["secret"], ttl_seconds=3600),
                tracer,
                HttpMetrics(Metrics()),
                OpenBodies(Settings.model_construct()),
            )
        ],
        exception_handlers=EXCEPTION_HANDLERS,
        request_class=Call,
        lifespan=[*([resources] if resources else []), lifespan],
        openapi_config=None,
        logging_config=None,
    )


def _book(config: Mapping[str, Any]) -> MenuBook:
    restaurant = Restaurant(
        id=config["id"], slug="bench", name="Bench", time_zone="Europe/Berlin", tax_basis_points=700
    )
    book = MenuBook(restaurant, {}, {})
    at = now()
    for id_, name, price in config["dishes"]:
        dish = MenuItem(
            id=id_, restaurant_id=restaurant.id, name=name, price=price, category="Mains", created_at=at, updated_at=at
        )
        book.put(Head(1, id_), dish)
    return book
