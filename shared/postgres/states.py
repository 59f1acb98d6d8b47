"""Reads current states. The row in an entity's table names the head, and the table `changes` has the state of that
change.

Only the sync worker writes states (services/sync/writer/upsert.py). A connection of the api role sees only the tenant
of its transaction.
"""

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from datetime import datetime
from typing import TYPE_CHECKING

from msgspec import Struct

from shared.entities.contract import Head
from shared.entities.entity import Entity, Hold, Keyed
from shared.entities.selection import Selection
from shared.postgres.blocks import first_megabytes, in_blocks, left_out
from shared.postgres.conditions import Conditions
from shared.postgres.pool import Connection

if TYPE_CHECKING:
    import asyncpg

# This join looks up changes row by row, after the limit of a page. In a plain join, the planner assumes that restaurant
# and change are independent. It then expects a hundredth of the real number of rows, and reads all orders of a
# restaurant, or all changes, to find a few.
_LATERAL = (
    "cross join lateral (select data, accepted_at from changes"
    " where restaurant_id = t.restaurant_id and change_id = t.change_id offset 0) c"
)
_FROM = f"{{table}} t {_LATERAL}"


class StoredState(Struct, frozen=True):
    head: Head
    state: bytes
    accepted_at: datetime
    conflict: bool = False
    """True while a conflict of the entity is open."""


def _stored(row: "asyncpg.Record") -> StoredState:
    head = Head(row["version"], row["change_id"])
    return StoredState(head, row["state"].encode(), row["accepted_at"], row["conflict"])


_OPEN_CONFLICTS = (
    "select entity_id from conflicts where restaurant_id = $1 and entity = '{entity}' and resolved_at is null"
)


def _in_conflict(entity: Entity) -> str:
    return (
        f"exists(select from conflicts x where x.restaurant_id = t.restaurant_id and x.entity = '{entity.name}'"
        " and x.entity_id = t.id and x.resolved_at is null)"
    )


def _columns(entity: Entity, change: str = "c") -> str:
    return (
        f"t.version, t.change_id::text, ({change}.data->'after')::text as state, {change}.accepted_at,"
        f" {_in_conflict(entity)} as conflict"
    )


async def find_state(connection: Connection, entity: Entity, restaurant: str, id_: str) -> StoredState | None:
    """Returns the current state of one entity, or None if PostgreSQL does not have it."""
    return (await states_of(connection, entity, restaurant, [id_])).get(id_)


async def states_of(
    connection: Connection, entity: Entity, restaurant: str, ids: Sequence[str]
) -> dict[str, StoredState]:
    """Returns a map from entity id to current state, for entities of one restaurant. Leaves out those that PostgreSQL
    does not have."""
    rows = await connection.fetch(
        f"select t.id::text, {_columns(entity)} from {_FROM.format(table=entity.table.name)}"  # noqa: S608
        " where t.restaurant_id = $1 and t.id = any($2::uuid[])",
        restaurant,
        list(ids),
    )
    return {row["id"]: _stored(row) for row in rows}


async def find_states(
    connection: Connection, entity: Entity, ids: Sequence[tuple[str, str]]
) -> AsyncGenerator[list[StoredState], None]:
    """Yields the current states of entities, given as (restaurant, id), over all tenants, in blocks of bounded size.
    Leaves out those that PostgreSQL does not have."""
    query = (
        f"select {_columns(entity)} from unnest($1::uuid[], $2::uuid[]) as wanted (restaurant_id, id)"  # noqa: S608
        f" cross join lateral (select * from {entity.table.name}"
        " where restaurant_id = wanted.restaurant_id and id = wanted.id offset 0) t"
        f" {_LATERAL}"
    )
    restaurants, wanted = [restaurant for restaurant, _ in ids], [id_ for _, id_ in ids]
    async with aclosing(in_blocks(connection, query, restaurants, wanted, column="state")) as blocks:
        async for rows in blocks:
            yield [_stored(row) for row in rows]


async def list_states(connection: Connection, entity: Entity, restaurant: str) -> list[StoredState]:
    """Returns all states that are not deleted. Use it only for entities with few rows, such as menu items."""
    rows = await connection.fetch(
        f"select {_columns(entity)} from {_FROM.format(table=entity.table.name)}"  # noqa: S608
        " where t.restaurant_id = $1 and t.deleted_at is null",
        restaurant,
    )
    return [_stored(row) for row in rows]


async def live_window(
    connection: Connection, entity: Entity, since: datetime
) -> AsyncGenerator[list[StoredState], None]:
    """Yields the live window of an entity over all tenants, in blocks of bounded size.

    For orders, the window has the open ones and those that changed after `since`. For most other entities it has all
    states (see `Entity.window_sql`).
    """
    where = entity.window_sql or "$1::timestamptz is not null"
    query = f"select {_columns(entity)} from {_FROM.format(table=entity.table.name)} where {where}"  # noqa: S608
    async with aclosing(in_blocks(connection, query, since, column="state")) as blocks:
        async for rows in blocks:
            yield [_stored(row) for row in rows]


async def heads(connection: Connection, entity: Entity, restaurant: str, ids: Sequence[str]) -> dict[str, Head]:
    """Returns a map from entity id to the entity's head in PostgreSQL."""
    rows = await connection.fetch(
        f"select id::text, version, change_id::text from {entity.table.name}"  # noqa: S608
        " where restaurant_id = $1 and id = any($2::uuid[])",
        restaurant,
        list(ids),
    )
    return {row["id"]: Head(row["version"], row["change_id"]) for row in rows}


async def keyed_heads(
    connection: Connection, entity: Entity, keyed: Keyed, since: datetime
) -> AsyncGenerator[list[tuple[str, str, Head]], None]:
    """Yields (restaurant, id, head) of the entities that may have been created with an Idempotency-Key after `since`,
    over all tenants, in blocks of up to 500."""
    async with connection.transaction(readonly=True):
        cursor = await connection.cursor(
            "select r.id::text, t.id::text, t.version, t.change_id::text from restaurants r"  # noqa: S608
            f" cross join lateral (select id, version, change_id from {entity.table.name}"
            f" where restaurant_id = r.id and created_at >= $1 and {keyed.sql} offset 0) t",
            since,
        )
        while rows := await cursor.fetch(500):
            yield [(row[0], row[1], Head(row[2], row[3])) for row in rows]


async def list_conflicts(connection: Connection) -> list[tuple[str, str, str]]:
    """Returns (restaurant, entity, id) of every entity with an open conflict, over all tenants."""
    rows = await connection.fetch(
        "select distinct restaurant_id::text, entity, entity_id::text from conflicts where resolved_at is null"
    )
    return [(row[0], row[1], row[2]) for row in rows]


async def list_page(
    connection: Connection,
    entity: Entity,
    restaurant: str,
    selection: Selection,
    *,
    without: Sequence[str] = (),
    conflict: bool | None = None,
) -> tuple[list[StoredState], bool]:
    """Returns (up to limit + 1 states, newest first; whether large ones were left out at the end). The additional state
    shows that there is another page.

    `without`: ids to leave out, because the caller has them from the mirror. `conflict`: True for only the states with
    an open conflict, False for only the states without one, None for both.
    """
    where = Conditions(restaurant)
    if not selection.include_deleted:
        where.add("t.deleted_at is null")
    for column, value in selection.equal.items():
        where.add(f"t.{column} = {{}}", value)
    for column, values in selection.among.items():
        where.add(f"t.{column} = any({{}})", list(values))
    if conflict is not None:
        # Open conflicts are few, so the query collects their ids. A check per row would read all rows of the restaurant
        # to fill a page.
        which = "in" if conflict else "not in"
        where.add(f"t.id {which} ({_OPEN_CONFLICTS.format(entity=entity.name)})")
    where.between("t.created_at, t.id", selection.created_from, selection.created_to, selection.before)
    if without:
        where.add("t.id <> all({}::uuid[])", list(without))
    newest = "order by t.created_at desc, t.id desc"
    selected = (
        "select t.restaurant_id, t.id, t.version, t.change_id, t.created_at"  # noqa: S608
        f" from {entity.table.name} t where {where} {newest} limit {int(selection.limit) + 1}"
    )
    page = first_megabytes(f"select t.*, c.data, c.accepted_at from ({selected}) t {_LATERAL}", "data", newest)  # noqa: S608
    rows = await connection.fetch(f"select {_columns(entity, 't')}, t.found from ({page}) t {newest}", *where.values)  # noqa: S608
    return [_stored(row) for row in rows], left_out(rows)


# Deleted items are included, because they can be restored with the count that they had. The holds come first, so that
# PostgreSQL reads no order whose hold is older than the last count.
_HELD_SINCE = """
cross join lateral (
    select order_id, quantity, held_at from order_holds
    where restaurant_id = i.restaurant_id and inventory_item_id = i.id and held_at >= i.counted_at offset 0
) h
cross join lateral (
    select from orders
    where restaurant_id = i.restaurant_id and id = h.order_id and status <> 'cancelled' and deleted_at is null offset 0
) o
"""
_HOLDS = f"""
select i.restaurant_id::text, h.order_id::text, array_agg(i.id::text), array_agg(h.quantity), array_agg(h.held_at)
from inventory_items i {_HELD_SINCE}
group by i.restaurant_id, h.order_id
"""  # noqa: S608


async def holds(connection: Connection) -> AsyncGenerator[list[tuple[str, str, list[Hold]]], None]:
    """Yields (restaurant, order, holds) of every order with holds since the last count, over all tenants, in blocks of
    500."""
    async with connection.transaction(readonly=True):
        cursor = await connection.cursor(_HOLDS)
        while rows := await cursor.fetch(500):
            yield [(row[0], row[1], list(zip(row[2], row[3], row[4], strict=True))) for row in rows]


_HELD = f"""
select i.id::text, sum(h.quantity)::int8
from (
    select $1::uuid as restaurant_id, given.* from unnest($2::uuid[], $3::timestamptz[]) as given (id, counted_at)
) i
{_HELD_SINCE}
group by i.id
"""  # noqa: S608


async def held(connection: Connection, restaurant: str, counted: Mapping[str, datetime]) -> dict[str, int]:
    """`counted`: inventory item id -> the time of its count. Returns a map from inventory item id to the amount that
    orders in PostgreSQL hold since then. Items without holds are left out."""
    rows = await connection.fetch(_HELD, restaurant, list(counted), list(counted.values()))
    return {row[0]: row[1] for row in rows}
