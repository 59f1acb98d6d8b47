"""The query plans of a request of one restaurant: PostgreSQL uses an index and reads only that restaurant's rows.

The real functions run on connections of the real roles; auto_explain logs the plan of each statement. PostgreSQL plans
the first runs of a statement for their values. Later it may use one plan for all values, if that plan seems as cheap.
The tests check both: the first run, the run after ten others, and the plan for all values.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from msgspec import Struct

from benchmarks.history import DAYS, History, fill
from services.orders import audit_reads
from services.orders.derived_figures import DerivedFigures
from services.orders.entity_reads import EntityReads
from services.sync.mirror.sync_status import sync_status
from services.sync.writer.upsert import write_batch
from shared.entities import customer, menu_item, order
from shared.entities.selection import Selection
from shared.observability.metrics import Metrics, ReadMetrics
from shared.postgres import money, states
from shared.restaurants import Restaurant
from shared.security.tokens import Identity, Role
from shared.settings import Settings
from tests.rigs.query_plans import BIG, MODES, Database, Plan, empty_database, filled_database
from tests.rigs.servers import Servers

RESTAURANTS, ORDERS_PER_RESTAURANT = 25, 1_000
PAGE_ROWS = 51


@pytest.fixture(scope="module")
async def database(servers: Servers) -> AsyncIterator[Database]:
    history = History("plans", RESTAURANTS, RESTAURANTS * ORDERS_PER_RESTAURANT, datetime.now(UTC))
    async with filled_database(servers, history) as database:
        yield database


class Case(Struct, frozen=True):
    work: Callable[[Database], Awaitable[Any]]
    rows: int
    """The most rows that may be read, of all big tables together."""
    not_when: str = ""
    """One of MODES that is not tested. The plan `for all values` reads more, and PostgreSQL must not choose it. In mode
    `at first` the planner knows how few rows there are, and reads them all."""


def orders(**fields: Any) -> Callable[[Database], Awaitable[Any]]:
    """Lists orders. `fields` are fields of a Selection, or functions that take the database and return the value."""

    async def page(database: Database) -> list[Any]:
        chosen = {name: value(database) if callable(value) else value for name, value in fields.items()}
        without = chosen.pop("without", [])
        async with database.api.tenant(database.restaurant.id) as connection:
            found, _ = await states.list_page(
                connection, order.ENTITY, database.restaurant.id, Selection(**chosen), without=without
            )
            return found

    return page


def payments(**fields: Any) -> Callable[[Database], Awaitable[Any]]:
    async def listed(database: Database) -> list[Any]:
        chosen = {name: value(database) if callable(value) else value for name, value in fields.items()}
        async with database.api.tenant(database.restaurant.id) as connection:
            return await money.payments(connection, database.restaurant.id, money.PaymentFilter(**chosen))

    return listed


def audited(limit: int = PAGE_ROWS, **fields: Any) -> Callable[[Database], Awaitable[Any]]:
    nothing = dict.fromkeys(("start", "end", "entity", "entity_id", "actor", "before"))

    async def listed(database: Database) -> list[Any]:
        chosen = {name: value(database) if callable(value) else value for name, value in fields.items()}
        async with database.api.tenant(database.restaurant.id) as connection:
            found, _ = await audit_reads.changes(
                connection, database.restaurant.id, **{**nothing, **chosen}, limit=limit
            )
            return found

    return listed


def summed(days: int) -> Callable[[Database], Awaitable[Any]]:
    async def summary(database: Database) -> list[Any]:
        today = database.history.until.date()
        async with database.api.tenant(database.restaurant.id) as connection:
            return await money.days(connection, database.restaurant.id, today - timedelta(days=days - 1), today)

    return summary


def derived_figures(database: Database) -> DerivedFigures:
    reads = EntityReads(database.api, database.mirror, ReadMetrics(Metrics()))
    return DerivedFigures(reads, database.api, database.mirror)


async def one_order(database: Database) -> Any:
    async with database.api.tenant(database.restaurant.id) as connection:
        return await states.find_state(connection, order.ENTITY, database.restaurant.id, database.oldest[0].id)


async def the_menu(database: Database) -> Any:
    async with database.api.tenant(database.restaurant.id) as connection:
        return await states.list_states(connection, menu_item.ENTITY, database.restaurant.id)


async def heads_of_orders(database: Database) -> Any:
    async with database.api.tenant(database.restaurant.id) as connection:
        return await states.heads(connection, order.ENTITY, database.restaurant.id, [database.oldest[0].id] * 50)


async def orders_at_tables(database: Database) -> Any:
    identity = Identity(database.restaurant.user_id, Role.STAFF, database.restaurant.id, "a@example.org")
    tables: Any = [SimpleNamespace(id=id_) for id_ in database.restaurant.table_ids]
    return await derived_figures(database).orders_at(database.restaurant.id, identity, tables)


async def totals_of_customers(database: Database) -> Any:
    at = database.history.until
    of = [
        customer.Customer(id=id_, restaurant_id=database.restaurant.id, name="Ada", created_at=at, updated_at=at)
        for id_ in database.restaurant.customer_ids[:3]
    ]
    return await derived_figures(database).totals(Restaurant(id=database.restaurant.id, slug="a", name="A"), of)


async def held_stock(database: Database) -> Any:
    async with database.api.tenant(database.restaurant.id) as connection:
        return await states.held(
            connection, database.restaurant.id, {database.restaurant.stock_id: database.history.counted_at}
        )


async def status_of_sync(database: Database) -> Any:
    restaurant = database.restaurant.id
    return await sync_status(Settings(), partial(database.api.tenant, restaurant), database.mirror, restaurant)


def before_the_last_page(database: Database) -> tuple[datetime, str]:
    found = database.oldest[25]
    return found.created_at, found.id


def ago(days: float) -> Callable[[Database], datetime]:
    return lambda database: database.history.until - timedelta(days=days)


def at_first_table(database: Database) -> dict[str, Any]:
    return {"table_id": database.restaurant.table_ids[0]}


STATE_ROWS = 2 * PAGE_ROWS + 6
"""The rows of a page and their states, and a few deleted orders that are skipped: one order in fifty is deleted."""

CASES = {
    "the newest orders": Case(orders(), STATE_ROWS),
    "the newest orders without the pending ones": Case(
        orders(without=lambda database: [database.oldest[0].id] * 20), STATE_ROWS
    ),
    "orders with the deleted ones": Case(orders(include_deleted=True), STATE_ROWS),
    "orders behind a cursor": Case(orders(before=before_the_last_page), STATE_ROWS),
    "orders of ten days": Case(orders(created_from=ago(100), created_to=ago(90)), STATE_ROWS),
    "orders of a year": Case(orders(created_from=ago(380), created_to=ago(10)), STATE_ROWS),
    "orders of a year behind a cursor": Case(
        orders(created_from=ago(380), created_to=ago(10), before=lambda database: (ago(20)(database), str(uuid4()))),
        STATE_ROWS,
    ),
    "orders by a status that many have": Case(orders(equal={"status": "completed"}), STATE_ROWS),
    "orders by a status that few have": Case(orders(equal={"status": "pending"}), 10),
    "orders by a status behind a cursor": Case(
        orders(equal={"status": "completed"}, before=before_the_last_page), STATE_ROWS
    ),
    "orders at a table": Case(orders(equal=at_first_table), STATE_ROWS),
    "open orders at a table": Case(
        orders(equal=lambda database: {"status": "pending", **at_first_table(database)}), 12, not_when="for all values"
    ),
    "orders of a customer": Case(
        orders(equal=lambda database: {"customer_id": database.restaurant.customer_ids[0]}), STATE_ROWS
    ),
    "orders of a guest": Case(orders(equal={"customer_session_id": "unknown"}), 0),
    "an order": Case(one_order, 2),
    "the menu": Case(the_menu, 12),
    "heads of fifty orders": Case(heads_of_orders, 50),
    "open orders at all tables": Case(orders_at_tables, 12, not_when="for all values"),
    "totals of three customers": Case(totals_of_customers, 70),
    "held stock": Case(held_stock, 60),
    "sync status": Case(status_of_sync, ORDERS_PER_RESTAURANT),
    "a summary of thirty days": Case(summed(30), 80),
    "a summary of all days": Case(summed(DAYS), ORDERS_PER_RESTAURANT),
    "the newest payments": Case(payments(), PAGE_ROWS),
    "payments behind a cursor": Case(payments(before=before_the_last_page), PAGE_ROWS),
    "payments of a year": Case(payments(start=ago(380), end=ago(10)), PAGE_ROWS),
    "payments by method": Case(payments(method="card"), 3 * PAGE_ROWS),
    "payments of an order": Case(payments(order_id=lambda database: database.oldest[0].id), 2),
    "the newest changes": Case(audited(), PAGE_ROWS),
    "changes behind a cursor": Case(audited(before=before_the_last_page), PAGE_ROWS),
    "changes of a year": Case(audited(start=ago(380), end=ago(10)), PAGE_ROWS),
    "changes of orders": Case(audited(entity="order"), PAGE_ROWS),
    "the newest changes of customers": Case(audited(5, entity="customer"), 5, not_when="at first"),
    "changes of an entity": Case(audited(entity="order", entity_id=lambda database: database.oldest[0].id), 4),
    "changes by an id only": Case(audited(entity_id=lambda database: database.oldest[0].id), 4),
    "changes by one actor": Case(audited(actor=lambda database: database.restaurant.user_id), PAGE_ROWS),
    "changes by an unknown actor": Case(audited(actor="unknown"), 0),
}


@pytest.mark.parametrize(
    ("name", "mode"), [(name, mode) for name, case in CASES.items() for mode in MODES if mode != case.not_when]
)
async def test_request_uses_an_index_and_reads_little_more_than_it_returns(
    database: Database, name: str, mode: str
) -> None:
    case = CASES[name]
    plans = await database.plans(lambda: case.work(database), mode)
    _by_index(plans)
    assert sum(plan.read() for plan in plans) <= case.rows, [plan.text for plan in plans]
    # A plan reads at most four pages of an index and one page of its table for each row.
    assert sum(plan.pages for plan in plans) <= 5 * case.rows + 40, [plan.text for plan in plans]


def _by_index(plans: list[Plan]) -> None:
    for plan in plans:
        for scan in plan.scans:
            assert "Seq Scan" not in scan["Node Type"], plan.text
        assert "JIT" not in plan.text, plan.text  # compiling the plan would take longer than the query


async def test_summary_is_read_from_the_index_only(database: Database) -> None:
    (plan,) = await database.plans(lambda: summed(30)(database), "at first")
    (scan,) = plan.scans
    assert (scan["Node Type"], scan["Heap Fetches"]) == ("Index Only Scan", 0)


async def test_row_level_security_is_active_in_these_tests(database: Database) -> None:
    async with database.api.connection() as connection:
        for table in BIG:
            assert await connection.fetchval("select row_security_active($1)", table), table
        assert await connection.fetchval("select current_user") == "ticketrail_api"
    async with database.api.tenant(database.restaurant.id) as connection:
        assert await connection.fetchval("select count(*) from orders") == ORDERS_PER_RESTAURANT


async def _drained(blocks: AsyncIterator[list[Any]]) -> int:
    return sum([len(block) async for block in blocks])


@pytest.mark.parametrize("mode", MODES)
async def test_lost_mirror_is_filled_by_reading_only_live_rows(database: Database, mode: str) -> None:
    since = database.history.until - timedelta(days=3)
    found = []

    async def work() -> None:
        async with database.writer.connection() as connection:
            found.append(await _drained(states.live_window(connection, order.ENTITY, since)))

    (plan,) = await database.plans(work, mode)
    assert RESTAURANTS * 5 < found[0] < RESTAURANTS * ORDERS_PER_RESTAURANT / 50
    _by_index([plan])
    assert plan.read("orders") <= 2 * found[0]
    assert plan.read("changes") == found[0]


@pytest.mark.parametrize("mode", MODES)
async def test_holds_before_the_recount_are_not_read(database: Database, mode: str) -> None:
    found = []

    async def work() -> None:
        async with database.writer.connection() as connection:
            found.append(await _drained(states.holds(connection)))

    (plan,) = await database.plans(work, mode)
    of_thirty_days = RESTAURANTS * ORDERS_PER_RESTAURANT * 30 / DAYS / 3
    assert 0 < found[0] <= of_thirty_days
    _by_index([plan])
    assert plan.read("order_holds") <= of_thirty_days * 1.1
    assert plan.read("orders") <= of_thirty_days * 1.1


async def _rows(connection: Any, table: str) -> list[str]:
    rows = await connection.fetch(f"select to_jsonb(t) - '{{written_at,xid,seq}}'::text[] from {table} t")
    return sorted(row[0] for row in rows)


async def test_bulk_fill_writes_the_same_rows_as_the_writer(servers: Servers) -> None:
    history = History("same", 2, 120, datetime.now(UTC))
    async with empty_database(servers) as (_, superuser_url, settings):
        restaurants = await fill(superuser_url, history)
        superuser = await asyncpg.connect(superuser_url)
        filled = {table: await _rows(superuser, table) for table in BIG}
        await superuser.execute("truncate orders, order_items, order_holds, payments, conflicts")
        await superuser.execute("delete from changes where entity = 'order'")
        writer: Any = await asyncpg.connect(settings.database_writer_url)
        written = sorted(
            (one for of_one in history.changes(restaurants) for one in of_one), key=lambda one: one.change.time
        )
        for start in range(0, len(written), 50):
            await write_batch(writer, written[start : start + 50], timeout_seconds=10.0)
        assert {table: await _rows(superuser, table) for table in BIG} == filled
        assert await superuser.fetchval("select count(*) from conflicts") == 0
        await writer.close()
        await superuser.close()
