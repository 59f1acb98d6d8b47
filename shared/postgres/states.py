"""Reading standing states: the row of an entity's table says which change stands, `changes` has its state verbatim.

Writing them is `changes.py` alone. Connections that belong to the api role see the tenant of their transaction only.
"""

from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from shared.entities.contract import Head
from shared.entities.entity import Entity, Hold
from shared.entities.selection import Selection
from shared.postgres.conditions import Conditions
from shared.postgres.pool import Connection

if TYPE_CHECKING:
    import asyncpg

# Looked up row by row, behind the limit of a page. In a plain join the planner takes restaurant and change for
# independent of one another, expects a hundredth of the rows that there are, and reads all of a restaurant's orders, or
# all of the log, to find a few.
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
    """An open one."""


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


def _columns(entity: Entity) -> str:
    return (
        "t.version, t.change_id::text, (c.data->'after')::text as state, c.accepted_at,"
        f" {_in_conflict(entity)} as conflict"
    )


async def one(connection: Connection, entity: Entity, restaurant: str, id_: str) -> StoredState | None:
    row = await connection.fetchrow(
        f"select {_columns(entity)} from {_FROM.format(table=entity.table.name)}"  # noqa: S608
        " where t.restaurant_id = $1 and t.id = $2",
        restaurant,
        id_,
    )
    return _stored(row) if row else None


async def every(connection: Connection, entity: Entity, restaurant: str) -> list[StoredState]:
    """All that are not deleted: for the small ones, such as a menu."""
    rows = await connection.fetch(
        f"select {_columns(entity)} from {_FROM.format(table=entity.table.name)}"  # noqa: S608
        " where t.restaurant_id = $1 and t.deleted_at is null",
        restaurant,
    )
    return [_stored(row) for row in rows]


async def live_window(connection: Connection, entity: Entity, since: datetime) -> AsyncIterator[list[StoredState]]:
    """What the mirror holds of an entity, over all tenants, in blocks: all small ones, and of orders the open ones and
    those changed `since`."""
    where = entity.window_sql or "$1::timestamptz is not null"
    async with connection.transaction(readonly=True):
        cursor = await connection.cursor(
            f"select {_columns(entity)} from {_FROM.format(table=entity.table.name)} where {where}",  # noqa: S608
            since,
        )
        while rows := await cursor.fetch(500):
            yield [_stored(row) for row in rows]


async def heads(connection: Connection, entity: Entity, restaurant: str, ids: Sequence[str]) -> dict[str, Head]:
    """Entity id -> its head in PostgreSQL."""
    rows = await connection.fetch(
        f"select id::text, version, change_id::text from {entity.table.name}"  # noqa: S608
        " where restaurant_id = $1 and id = any($2::uuid[])",
        restaurant,
        list(ids),
    )
    return {row["id"]: Head(row["version"], row["change_id"]) for row in rows}


async def in_conflict(connection: Connection) -> list[tuple[str, str, str]]:
    """(restaurant, entity, id) of all that have an open conflict, over all tenants."""
    rows = await connection.fetch(
        "select distinct restaurant_id::text, entity, entity_id::text from conflicts where resolved_at is null"
    )
    return [(row[0], row[1], row[2]) for row in rows]


_GAPS = """
select c.restaurant_id::text, c.entity, c.entity_id::text, c.version
from changes c
where c.accepted_at between now() - make_interval(mins => $2) and now() - make_interval(mins => $1)
  and c.version > 1
  and not exists (
    select from changes p
    where p.restaurant_id = c.restaurant_id and p.entity = c.entity and p.entity_id = c.entity_id
      and p.version = c.version - 1
  )
limit 100
"""


async def gaps(connection: Connection, *, older_minutes: int, younger_minutes: int) -> list[dict[str, Any]]:
    """Changes of that age whose version has no predecessor: it is still under way after all that time, or lost."""
    return [dict(row) for row in await connection.fetch(_GAPS, older_minutes, younger_minutes)]


async def page(
    connection: Connection,
    entity: Entity,
    restaurant: str,
    selection: Selection,
    *,
    without: Sequence[str] = (),
    conflict: bool | None = None,
) -> list[StoredState]:
    """One more than the limit, the newest first. `without`: ids that the caller has from elsewhere; `conflict`: only
    those with an open one, or only those without."""
    where = Conditions(restaurant)
    if not selection.include_deleted:
        where.add("t.deleted_at is null")
    for column, value in selection.equal.items():
        where.add(f"t.{column} = {{}}", value)
    for column, values in selection.among.items():
        where.add(f"t.{column} = any({{}})", list(values))
    if conflict is not None:
        # By their ids: they are few, and a page of them would be looked for among all that the restaurant has.
        which = "in" if conflict else "not in"
        where.add(f"t.id {which} ({_OPEN_CONFLICTS.format(entity=entity.name)})")
    where.between("t.created_at, t.id", selection.created_from, selection.created_to, selection.before)
    if without:
        where.add("t.id <> all({}::uuid[])", list(without))
    newest = "order by t.created_at desc, t.id desc"
    wanted = (
        "select t.restaurant_id, t.id, t.version, t.change_id, t.created_at"  # noqa: S608
        f" from {entity.table.name} t where {where} {newest} limit {int(selection.limit) + 1}"
    )
    rows = await connection.fetch(f"select {_columns(entity)} from ({wanted}) t {_LATERAL} {newest}", *where.values)  # noqa: S608
    return [_stored(row) for row in rows]


# Of items that are deleted too: they may be restored, with the count that they had.
# In this order: what was held before the last count is not looked at.
_HELD_SINCE = """
from inventory_items i
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
{_HELD_SINCE}
group by i.restaurant_id, h.order_id
"""


async def holds(connection: Connection) -> AsyncIterator[list[tuple[str, str, list[Hold]]]]:
    """What orders hold of the stock since it was counted, over all tenants, in blocks: (restaurant, order, holds)."""
    async with connection.transaction(readonly=True):
        cursor = await connection.cursor(_HOLDS)
        while rows := await cursor.fetch(500):
            yield [(row[0], row[1], list(zip(row[2], row[3], row[4], strict=True))) for row in rows]


_HELD = f"""
select i.id::text, sum(h.quantity)::int8
{_HELD_SINCE}
where i.restaurant_id = $1 and i.id = any($2::uuid[])
group by i.id
"""


async def held(connection: Connection, restaurant: str, items: Sequence[str]) -> dict[str, int]:
    """What orders hold of each inventory item, as far as PostgreSQL knows; without those of which nothing is held."""
    return {row[0]: row[1] for row in await connection.fetch(_HELD, restaurant, list(items))}
