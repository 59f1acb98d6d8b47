"""Reading standing states: the row of an entity's table says which change stands, `changes` has its state verbatim.

Writing them is `changes.py` alone. Connections that belong to the api role see the tenant of their transaction only.
"""

from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from shared.entities.contract import Standing
from shared.entities.entity import Entity
from shared.entities.selection import Selection
from shared.postgres.pool import Connection

if TYPE_CHECKING:
    import asyncpg

_STATE = "t.version, t.change_id::text, (c.data->'after')::text as state, c.accepted_at"
_FROM = "{table} t join changes c on c.restaurant_id = t.restaurant_id and c.change_id = t.change_id"


class Stored(Struct, frozen=True):
    standing: Standing
    state: bytes
    accepted_at: datetime


def _stored(row: "asyncpg.Record") -> Stored:
    return Stored(Standing(row["version"], row["change_id"]), row["state"].encode(), row["accepted_at"])


async def one(connection: Connection, entity: Entity, restaurant: str, id_: str) -> Stored | None:
    row = await connection.fetchrow(
        f"select {_STATE} from {_FROM.format(table=entity.table.name)} where t.restaurant_id = $1 and t.id = $2",  # noqa: S608
        restaurant,
        id_,
    )
    return _stored(row) if row else None


async def every(connection: Connection, entity: Entity, restaurant: str) -> list[Stored]:
    """All that are not deleted: for the small ones, such as a menu."""
    rows = await connection.fetch(
        f"select {_STATE} from {_FROM.format(table=entity.table.name)}"  # noqa: S608
        " where t.restaurant_id = $1 and t.deleted_at is null",
        restaurant,
    )
    return [_stored(row) for row in rows]


async def live_window(connection: Connection, entity: Entity, since: datetime) -> AsyncIterator[list[Stored]]:
    """What the mirror holds of an entity, over all tenants, in blocks: all small ones, and of orders the open ones and
    those changed `since`."""
    where = entity.window_sql or "$1::timestamptz is not null"
    async with connection.transaction(readonly=True):
        cursor = await connection.cursor(
            f"select {_STATE} from {_FROM.format(table=entity.table.name)} where {where}",  # noqa: S608
            since,
        )
        while rows := await cursor.fetch(500):
            yield [_stored(row) for row in rows]


async def standings(connection: Connection, entity: Entity, restaurant: str, ids: Sequence[str]) -> dict[str, Standing]:
    """Which change of each stands in PostgreSQL."""
    rows = await connection.fetch(
        f"select id::text, version, change_id::text from {entity.table.name}"  # noqa: S608
        " where restaurant_id = $1 and id = any($2::uuid[])",
        restaurant,
        list(ids),
    )
    return {row["id"]: Standing(row["version"], row["change_id"]) for row in rows}


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
    connection: Connection, entity: Entity, restaurant: str, selection: Selection, *, without: Sequence[str] = ()
) -> list[Stored]:
    """One more than the limit, the newest first. `without`: ids that the caller has from elsewhere."""
    wheres, arguments = ["t.restaurant_id = $1"], [restaurant]

    def where(condition: str, *values: Any) -> None:
        arguments.extend(values)
        places = [f"${len(arguments) - len(values) + i + 1}" for i in range(len(values))]
        wheres.append(condition.format(*places))

    if not selection.include_deleted:
        wheres.append("t.deleted_at is null")
    for column, value in selection.equal.items():
        where(f"t.{column} = {{0}}", value)
    for column, values in selection.among.items():
        where(f"t.{column} = any({{0}})", list(values))
    if selection.created_from is not None:
        where("t.created_at >= {0}", selection.created_from)
    if selection.created_to is not None:
        where("t.created_at <= {0}", selection.created_to)
    if selection.before is not None:
        where("(t.created_at, t.id) < ({0}, {1}::uuid)", *selection.before)
    if without:
        where("t.id <> all({0}::uuid[])", list(without))
    rows = await connection.fetch(
        f"select {_STATE} from {_FROM.format(table=entity.table.name)} where {' and '.join(wheres)}"  # noqa: S608
        f" order by t.created_at desc, t.id desc limit {int(selection.limit) + 1}",
        *arguments,
    )
    return [_stored(row) for row in rows]


_HOLDS = """
select h.restaurant_id::text, h.order_id::text, o.created_at, h.inventory_item_id::text, h.quantity
from order_holds h
join inventory_items i on i.restaurant_id = h.restaurant_id and i.id = h.inventory_item_id and i.deleted_at is null
join orders o on o.restaurant_id = h.restaurant_id and o.id = h.order_id
where o.created_at >= i.counted_at and o.status <> 'cancelled' and o.deleted_at is null and h.quantity > 0
order by h.restaurant_id, h.order_id
"""


async def holds(connection: Connection) -> AsyncIterator[list[tuple[str, str, datetime, str, int]]]:
    """What orders hold of the stock since it was counted, over all tenants, in blocks: (restaurant, order, placed at,
    inventory item, quantity)."""
    async with connection.transaction(readonly=True):
        cursor = await connection.cursor(_HOLDS)
        while rows := await cursor.fetch(500):
            yield [tuple(row) for row in rows]


_HELD = """
select h.inventory_item_id::text, sum(h.quantity)::int8
from order_holds h
join inventory_items i on i.restaurant_id = h.restaurant_id and i.id = h.inventory_item_id
join orders o on o.restaurant_id = h.restaurant_id and o.id = h.order_id
where h.restaurant_id = $1 and h.inventory_item_id = any($2::uuid[])
    and o.created_at >= i.counted_at and o.status <> 'cancelled' and o.deleted_at is null
group by 1
"""


async def held(connection: Connection, restaurant: str, items: Sequence[str]) -> dict[str, int]:
    """What orders hold of each inventory item, as far as PostgreSQL knows; without those of which nothing is held."""
    return {row[0]: row[1] for row in await connection.fetch(_HELD, restaurant, list(items))}
