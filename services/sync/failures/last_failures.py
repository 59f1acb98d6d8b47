"""Reads the last failure of changes. Readers of an entity see it while the change waits for a retry or is dead.

The sources are the tables `retries` and `dead_letters`. The connection may have any role that can read both.
"""

from collections.abc import AsyncGenerator, Sequence
from datetime import datetime

from msgspec import Struct

from shared.postgres.feed import Snapshot
from shared.postgres.pool import Connection

_FAILED = """
select r.change_id::text, r.error, r.attempt as attempts, r.failed_at from retries r
join unnest($1::uuid[], $2::uuid[]) as requested (restaurant_id, change_id) using (restaurant_id, change_id)
union all
select l.change_id::text, l.error, json_array_length(l.attempts), l.last_failed_at from dead_letters l
join unnest($1::uuid[], $2::uuid[]) as requested (restaurant_id, change_id) using (restaurant_id, change_id)
where l.lane is not null and l.status in ('open', 'replaying')
order by failed_at
"""


# Rows that an earlier snapshot did not show: of transactions that ran then, and of later ones.
_NEWLY_VISIBLE = "{}xid = any($1::text[]::xid8[]) or {}xid >= $2::text::xid8"
_NEW = f"""
select restaurant_id::text, entity, entity_id::text, change_id::text, error, attempt as attempts, failed_at
from retries where {_NEWLY_VISIBLE.format("", "")}
union all
select l.restaurant_id::text, l.entity, l.entity_id::text, l.change_id::text, l.error, json_array_length(l.attempts),
    l.last_failed_at
from dead_letters l
where ({_NEWLY_VISIBLE.format("l.", "l.")}) and l.lane is not null and l.status in ('open', 'replaying')
    and l.restaurant_id is not null and l.entity is not null and l.entity_id is not null and l.change_id is not null
order by failed_at
"""  # noqa: S608  (the condition above)
_ROWS_PER_BLOCK = 500
_EVERYTHING = Snapshot(0, 0, ())


class NewFailure(Struct, frozen=True):
    """A failure that another snapshot did not show."""

    restaurant_id: str
    entity: str
    entity_id: str
    change_id: str
    last: "LastFailure"


class LastFailure(Struct, frozen=True):
    """The last failure of a change that is on the retry ladder or dead."""

    error: str
    attempts: int
    last_attempt: datetime


async def last_failures(connection: Connection, changes: Sequence[tuple[str, str]]) -> dict[str, LastFailure]:
    """Returns change id -> last failure of each change that is on the retry ladder or has an unresolved dead letter.

    `changes`: pairs of restaurant id and change id."""
    restaurants, ids = [restaurant for restaurant, _ in changes], [change for _, change in changes]
    rows = await connection.fetch(_FAILED, restaurants, ids)
    return {row["change_id"]: LastFailure(row["error"], row["attempts"], row["failed_at"]) for row in rows}


async def new_failures(connection: Connection, seen: Snapshot | None) -> AsyncGenerator[list[NewFailure], None]:
    """Yields the last failures that became visible after the snapshot `seen`, or all of them, in blocks. A change may
    occur twice; its later failure comes later."""
    seen = seen or _EVERYTHING
    async with connection.transaction(readonly=True):
        cursor = await connection.cursor(_NEW, [str(xid) for xid in seen.running], str(seen.xmax))
        while rows := await cursor.fetch(_ROWS_PER_BLOCK):
            yield [NewFailure(row[0], row[1], row[2], row[3], LastFailure(row[4], row[5], row[6])) for row in rows]
