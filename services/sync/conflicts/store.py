"""Reads conflicts and closes them. `writer/upsert.py` opens a conflict for two changes that claim one version or have
one base.

Connections have the ops role. A connection that only reads may also have the api role, inside `Postgres.tenant`; it
sees the conflicts of one restaurant.
"""

from datetime import datetime
from typing import Any
from uuid import UUID

import msgspec
from msgspec import Struct

from services.sync import audit
from shared.entities.contract import Head
from shared.errors import Conflict, NotFound
from shared.observability.tracing import trace_id_of
from shared.postgres.pool import Connection

_COLUMNS = (
    "id::text, restaurant_id::text, entity, entity_id::text, version, change_id::text, other_change_id::text,"
    " opened_at, resolved_at, resolved_by, why, kept_change_id::text, resolved_change_id::text"
)
_LIST = f"""
select {_COLUMNS} from conflicts
where ($1::uuid is null or restaurant_id = $1) and ($2::text is null or entity = $2)
    and ($3::uuid is null or entity_id = $3) and ($4::bool is null or (resolved_at is null) = $4)
    and ($5::timestamptz is null or (opened_at, id) < ($5, $6::uuid))
order by opened_at desc, id desc limit $7
"""  # noqa: S608
_ONE = f"select {_COLUMNS} from conflicts where id = $1"  # noqa: S608
_BETWEEN = """
select id::text, concat_ws(' ', entity, entity_id, 'v' || version, case when resolved_at is null then 'open' else
    'decided' end)
from conflicts where id between $1 and $2 order by id limit $3
"""
_SIDES = """
select change_id::text, version, type, source, actor, accepted_at, traceparent, (data->'after')::text as state
from changes where restaurant_id = $1 and change_id = any($2::uuid[])
"""
_RESOLVE = f"""
update conflicts
set resolved_at = now(), resolved_by = $2, why = $3, kept_change_id = $4, resolved_change_id = $5
where id = $1 returning {_COLUMNS}
"""  # noqa: S608


class Fork(Struct, frozen=True, kw_only=True):
    """A conflict: two accepted changes of one entity, of which an operator keeps one. The conflict is open
    while `resolved_at` is None."""

    id: str
    restaurant_id: str
    entity: str
    entity_id: str
    version: int
    change_id: str
    other_change_id: str
    opened_at: datetime
    resolved_at: datetime | None
    resolved_by: str | None
    why: str | None
    kept_change_id: str | None
    resolved_change_id: str | None
    """The change that enforced the decision; None if the entity already had the values of the kept change."""


class Side(Struct, frozen=True, kw_only=True):
    change_id: str
    version: int
    type: str
    source: str
    actor: str | None
    accepted_at: datetime
    trace_id: str | None
    state: dict[str, Any]
    """The whole state after the change."""

    @property
    def head(self) -> Head:
        return Head(self.version, self.change_id)


async def page(
    connection: Connection,
    *,
    restaurant_id: str | None = None,
    entity: str | None = None,
    entity_id: str | None = None,
    is_open: bool | None = True,
    before: tuple[datetime, str] | None = None,
    limit: int = 50,
) -> list[Fork]:
    """Returns conflicts, newest first. `is_open`: None for open and decided conflicts. To learn whether another page
    follows, ask for one row more than the page shows."""
    at, id_ = before or (None, None)
    rows = await connection.fetch(_LIST, restaurant_id, entity, entity_id, is_open, at, id_, limit)
    return [Fork(**row) for row in rows]


async def one(connection: Connection, id_: str) -> Fork:
    """Returns one conflict. Raises NotFound."""
    row = await connection.fetchrow(_ONE, id_)
    if row is None:
        raise NotFound("no such conflict")
    return Fork(**row)


async def ids_between(connection: Connection, first: UUID, last: UUID, limit: int) -> list[tuple[str, str]]:
    """Returns (id, short description) of the conflicts whose ids are from `first` to `last`, in order."""
    return [tuple(row) for row in await connection.fetch(_BETWEEN, first, last, limit)]


async def take(connection: Connection, id_: str) -> Fork:
    """Locks an open conflict until the transaction ends, and returns it. Raises NotFound, and Conflict
    (`conflict_resolved`) if it is already decided."""
    row = await connection.fetchrow(f"{_ONE} for update", id_)
    if row is None:
        raise NotFound("no such conflict")
    found = Fork(**row)
    if found.resolved_at is not None:
        raise Conflict(
            f"{found.resolved_by} has already decided this conflict",
            code="conflict_resolved",
            kept_change_id=found.kept_change_id,
        )
    return found


async def sides(connection: Connection, conflict: Fork) -> tuple[Side, Side]:
    """Returns (winner, loser) by the guard."""
    ids = [conflict.change_id, conflict.other_change_id]
    found = [_side(row) for row in await connection.fetch(_SIDES, conflict.restaurant_id, ids)]
    loser, winner = sorted(found, key=lambda side: side.head)
    return winner, loser


async def resolve(
    connection: Connection,
    conflict: Fork,
    *,
    keep: str,
    change_id: str | None,
    why: str,
    actor: str,
    role: str,
) -> Fork:
    """Closes the conflict with a row in `audit`, in the caller's transaction. `change_id`: the change that enforces the
    decision, if any."""
    (row,) = await connection.fetch(_RESOLVE, conflict.id, actor, why, keep, change_id)
    await audit.record(
        connection,
        actor=actor,
        role=role,
        action="conflict.resolve",
        target=f"conflict/{conflict.id}",
        restaurant_id=conflict.restaurant_id,
        why=why,
        details={
            "entity": conflict.entity,
            "entity_id": conflict.entity_id,
            "version": conflict.version,
            "kept": keep,
            "change_id": change_id,
        },
    )
    return Fork(**row)


def _side(row: Any) -> Side:
    return Side(
        change_id=row["change_id"],
        version=row["version"],
        type=row["type"],
        source=row["source"],
        actor=row["actor"],
        accepted_at=row["accepted_at"],
        trace_id=trace_id_of(row["traceparent"]),
        state=msgspec.json.decode(row["state"]),
    )
