"""Reads the changes and the audit of identity in PostgreSQL. The triggers and functions of
shared/postgres/migrations/0008_identity.sql write the audit of identity, such as each sign-in."""

from datetime import datetime
from typing import Any

from shared.entities import order, registry
from shared.postgres.blocks import first_megabytes, left_out
from shared.postgres.conditions import Conditions
from shared.postgres.pool import Connection

IDENTITIES = ("user", "api_key")
"""These are identity, so they have no changes. The table `identity_events` records their history."""
_FREQUENT_ENTITY = order.ENTITY.name
"""Nearly all changes are changes of orders. The changes of other entities have their own index (changes_newest_of)."""


async def changes(
    connection: Connection,
    restaurant: str,
    *,
    start: datetime | None,
    end: datetime | None,
    entity: str | None,
    entity_id: str | None,
    actor: str | None,
    before: tuple[datetime, str] | None,
    limit: int,
) -> tuple[list[dict[str, Any]], bool]:
    """Returns (changes, newest first; whether large ones were left out at the end). `before` is (accepted_at, change
    id) of the last change of the previous page."""
    where = Conditions(restaurant)
    if entity is not None:
        where.add("t.entity = {}", entity)
        if entity != _FREQUENT_ENTITY:
            where.add(f"t.entity <> '{_FREQUENT_ENTITY}'")
    elif entity_id is not None:
        where.add("t.entity = any({})", list(registry.ENTITIES))  # the index needs its first column
    if entity_id is not None:
        where.add("t.entity_id = {}", entity_id)
    if actor is not None:
        where.add("t.actor = {}", actor)
    where.between("t.accepted_at, t.change_id", start, end, before)
    newest = "order by t.accepted_at desc, t.change_id desc"
    page = first_megabytes(f"select t.* from changes t where {where} {newest} limit {int(limit)}", "data", newest)  # noqa: S608
    rows = await connection.fetch(
        "select t.change_id::text, t.entity, t.entity_id::text, t.version, t.type, t.source, t.accepted_at, t.actor,"  # noqa: S608
        f" t.data::text, t.found from ({page}) t {newest}",
        *where.values,
    )
    return [{name: value for name, value in row.items() if name != "found"} for row in rows], left_out(rows)


async def identity_events(
    connection: Connection,
    restaurant: str,
    *,
    start: datetime | None,
    end: datetime | None,
    entity: str,
    entity_id: str | None,
    actor: str | None,
    before: tuple[datetime, str] | None,
    limit: int,
) -> tuple[list[dict[str, Any]], bool]:
    """Returns what happened to users or API keys, newest first. The arguments are those of `changes`. These rows are
    small, so none is left out."""
    where = Conditions(restaurant)
    where.add("t.entity = {}", entity)
    if entity_id is not None:
        where.add("t.entity_id = {}", entity_id)
    if actor is not None:
        where.add("t.actor = {}", actor)
    where.between("t.at, t.id", start, end, before)
    rows = await connection.fetch(
        "select t.id::text as change_id, t.entity, t.entity_id::text, null::int as version,"  # noqa: S608
        " 'ticketrail.' || t.entity || '.' || t.action as type, 'identity' as source, t.at as accepted_at, t.actor,"
        " t.address, t.changed::text"
        f" from identity_events t where {where} order by t.at desc, t.id desc limit {int(limit)}",
        *where.values,
    )
    return [dict(row) for row in rows], False
