"""Row-level security and the database roles, as PostgreSQL enforces them."""

import asyncpg
import pytest

from services.sync.writer.upsert import DecodedChange, write_batch
from shared.entities import order as orders
from shared.entities.contract import Lane
from tests.rigs.builders import OTHER_RESTAURANT, RESTAURANT, change, order, payment
from tests.rigs.system import System

TABLES = ("orders", "order_items", "payments", "changes")


@pytest.fixture
async def of_two_tenants(system: System) -> None:
    """The same order id in two restaurants, with items and a payment."""
    states = [order(restaurant_id=tenant, payments=(payment(),)) for tenant in (RESTAURANT, OTHER_RESTAURANT)]
    async with system.database("ticketrail_writer") as connection:
        await write_batch(
            connection,
            [DecodedChange(Lane.CRITICAL, orders.ENTITY, change(state), state) for state in states],
            timeout_seconds=5.0,
        )


async def counts(connection: "asyncpg.Connection[asyncpg.Record]", tenant: str | None) -> dict[str, set[str]]:
    found = {}
    async with connection.transaction():
        if tenant is not None:
            await connection.execute("select set_config('app.tenant', $1, true)", tenant)
        for table in TABLES:
            rows = await connection.fetch(f"select distinct restaurant_id::text from {table}")
            found[table] = {row[0] for row in rows}
    return found


@pytest.mark.usefixtures("of_two_tenants")
async def test_api_role_sees_only_the_tenant_of_its_transaction(system: System) -> None:
    async with system.database("ticketrail_api") as connection:
        for tenant in (RESTAURANT, OTHER_RESTAURANT):
            assert await counts(connection, tenant) == {table: {tenant} for table in TABLES}


@pytest.mark.usefixtures("of_two_tenants")
async def test_api_role_sees_nothing_without_a_tenant(system: System) -> None:
    async with system.database("ticketrail_api") as connection:
        for tenant in (None, ""):
            assert await counts(connection, tenant) == {table: set() for table in TABLES}


@pytest.mark.usefixtures("of_two_tenants")
async def test_row_level_security_holds_for_the_owner_too(system: System) -> None:
    async with system.database("ticketrail_owner") as connection:
        assert await connection.fetchval("select count(*) from orders") == 0


@pytest.mark.parametrize(
    "statement",
    [
        "update orders set total = 0",
        "delete from orders",
        "insert into conflicts (restaurant_id, entity, entity_id, version, change_id, other_change_id)"
        " values (gen_random_uuid(), 'order', gen_random_uuid(), 1, gen_random_uuid(), gen_random_uuid())",
        "select * from users",
        "select * from terminals",
        "update heartbeats set sent_at = now()",
    ],
)
async def test_api_role_cannot_write_or_read_accounts(system: System, statement: str) -> None:
    async with system.database("ticketrail_api") as connection:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(statement)


@pytest.mark.usefixtures("of_two_tenants")
async def test_table_of_changes_is_append_only_for_the_writer_too(system: System) -> None:
    async with system.database("ticketrail_writer") as connection:
        for statement in ("delete from changes", "update changes set version = 7"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(statement)


async def test_tenant_of_a_transaction_ends_with_it(system: System) -> None:
    async with system.database("ticketrail_api") as connection:
        await counts(connection, RESTAURANT)
        assert await counts(connection, None) == {table: set() for table in TABLES}
