"""The peer of the accept benchmark: Litestar with one direct PostgreSQL transaction per order.

The same server (Granian, one worker, uvloop), gate, token cache, validation, pricing, menu in memory and answer as the
orders service; only what happens to the order differs: number counter, order, items and a sync log row in one
transaction over a pool of 20 with prepared statements. Traces are off, and nothing is pushed or mirrored.
"""

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
from litestar import Litestar, get, post
from litestar.datastructures import State
from litestar.types import ASGIApp

from services.orders.menu import MenuBook
from services.orders.pricing import priced_items, totals
from services.orders.requests import PlaceOrder
from services.orders.views import PENDING, state_view
from shared.bodies import read_body
from shared.entities.contract import Standing, encode, now
from shared.entities.menu_item import MenuItem
from shared.entities.order import Order, Status
from shared.gate import gate
from shared.http import EXCEPTION_HANDLERS, Call, Reply, success
from shared.lifecycle import settle_memory
from shared.metrics import HttpMetrics, Metrics
from shared.restaurants import Restaurant
from shared.security import Tokens
from shared.settings import Settings
from shared.tracing import Tracer

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


@post("/api/orders")
async def place(request: Call) -> ASGIApp:
    who = request.identity
    wanted = read_body(await request.whole_body(), PlaceOrder)
    book: MenuBook = request.app.state["books"][who.tenant]
    restaurant, at = book.restaurant, now()
    items = priced_items(wanted.items, book.menu)
    sums = totals(
        items,
        basis_points=restaurant.tax_basis_points,
        tip=wanted.tip_amount,
        discount=wanted.discount_amount,
        deposit=wanted.deposit_used,
    )
    order = Order(
        id=str(uuid4()),
        restaurant_id=restaurant.id,
        order_number="",
        business_day=restaurant.business_day(at),
        status=Status.PENDING,
        items=items,
        currency=restaurant.currency,
        subtotal=sums.subtotal,
        tax_basis_points=restaurant.tax_basis_points,
        tax_amount=sums.tax_amount,
        tip_amount=wanted.tip_amount,
        discount_amount=wanted.discount_amount,
        deposit_used=wanted.deposit_used,
        total=sums.total,
        created_at=at,
        updated_at=at,
        table_id=str(wanted.table_id) if wanted.table_id else None,
        customer_name=wanted.customer_name,
        placed_by=who.user_id,
    )
    pool: asyncpg.Pool = request.app.state["pool"]
    # The counter as late as can be: its row stays locked until the commit.
    async with pool.acquire() as connection, connection.transaction():
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
        number = await connection.fetchval(_COUNT, order.restaurant_id, order.business_day)
        numbered = f"{number:04d}"
        await connection.execute(
            _ORDER,
            order.restaurant_id,
            order.id,
            numbered,
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
            request.header(b"idempotency-key"),
            order.placed_by,
            order.created_at,
            order.updated_at,
        )
    state = encode(order).replace(b'"order_number":""', b'"order_number":"%b"' % numbered.encode(), 1)
    return success(state_view(state, Standing(1, order.id), PENDING), status=201, headers={"ETag": '"1"'})


@get("/health/ready")
async def ready() -> ASGIApp:
    return Reply(b'{"status":"ready"}')


def create() -> Litestar:
    described = json.loads(Path(os.environ["BENCH_RESTAURANTS"]).read_text())
    state = State({"books": {one["id"]: _book(one) for one in described["restaurants"]}})
    tracer = Tracer("direct", Settings(trace_sample=0))

    @asynccontextmanager
    async def lifespan(app: Litestar) -> AsyncIterator[None]:
        async with asyncpg.create_pool(os.environ["BENCH_DATABASE_URL"], min_size=20, max_size=20) as pool:
            await pool.execute(SCHEMA)
            app.state["pool"] = pool
            settle_memory()
            yield

    return Litestar(
        route_handlers=[place, ready],
        state=state,
        middleware=[gate(Tokens(described["secret"], ttl_seconds=3600), tracer, HttpMetrics(Metrics()))],
        exception_handlers=EXCEPTION_HANDLERS,
        request_class=Call,
        lifespan=[lifespan],
        openapi_config=None,
        logging_config=None,
    )


def _book(one: dict[str, Any]) -> MenuBook:
    restaurant = Restaurant(id=one["id"], slug="bench", name="Bench", time_zone="Europe/Berlin", tax_basis_points=700)
    book = MenuBook(restaurant, {}, {})
    for id_, name, price in one["dishes"]:
        at = now()
        dish = MenuItem(
            id=id_, restaurant_id=one["id"], name=name, price=price, category="Mains", created_at=at, updated_at=at
        )
        book.put(Standing(1, id_), dish)
    return book


if __name__ == "__main__":
    from shared.http import serve

    serve("benchmarks.peers.direct:create", host="127.0.0.1", port=int(os.environ["BENCH_PORT"]))
