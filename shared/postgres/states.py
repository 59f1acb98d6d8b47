"""Reading standing states: the row of an entity's table says which change stands, `changes` has its state verbatim.

Writing them is `changes.py` alone. Connections that belong to the api role see the tenant of their transaction only.
"""

from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from shared.entities.contract import Standing
from shared.entities.entity import Entity
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


async def page_of_orders(
    connection: Connection, entity: Entity, restaurant: str, filters: dict[str, Any], limit: int
) -> list[Stored]:
    """The newest first. Filters: status, table_id, session, created_from, created_to, before (created_at, id), without
    (ids that the caller has from elsewhere)."""
    wheres, arguments = ["t.restaurant_id = $1", "t.deleted_at is null"], [restaurant]

    def where(condition: str, *values: Any) -> None:
        arguments.extend(values)
        places = [f"${len(arguments) - len(values) + i + 1}" for i in range(len(values))]
        wheres.append(condition.format(*places))

    if (status := filters.get("status")) is not None:
        where("t.status = {0}", status)
    if (table := filters.get("table_id")) is not None:
        where("t.table_id = {0}::uuid", table)
    if (session := filters.get("session")) is not None:
        where("t.customer_session_id = {0}", session)
    if (start := filters.get("created_from")) is not None:
        where("t.created_at >= {0}", start)
    if (end := filters.get("created_to")) is not None:
        where("t.created_at <= {0}", end)
    if (before := filters.get("before")) is not None:
        where("(t.created_at, t.id) < ({0}, {1}::uuid)", *before)
    if without := filters.get("without"):
        where("t.id <> all({0}::uuid[])", list(without))
    rows = await connection.fetch(
        f"select {_STATE} from {_FROM.format(table=entity.table.name)} where {' and '.join(wheres)}"  # noqa: S608
        f" order by t.created_at desc, t.id desc limit {int(limit)}",
        *arguments,
    )
    return [_stored(row) for row in rows]
