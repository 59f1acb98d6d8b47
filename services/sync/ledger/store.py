"""Finds changes in PostgreSQL by their ids, for the ledger.

Connections have the ops or writer role, which sees every tenant. Each call is one statement, so pass at most a few
thousand ids.
"""

from collections.abc import Sequence

from shared.postgres.pool import Connection

_SYNCED = """
select c.change_id::text, c.xid, c.seq from changes c
join unnest($1::uuid[], $2::uuid[]) as requested (restaurant_id, change_id) using (restaurant_id, change_id)
"""
# Dead letters of the mirror writer have no lane. They are left out, because their changes may be in PostgreSQL. A
# resolved dead letter without a replacement was replayed; unless `changes` has its change, the change is lost. A dead
# letter may lack its restaurant, so it is selected only by the change id.
_DEAD = """
select distinct on (change_id) change_id::text,
    case when status in ('open', 'replaying', 'discarded') then status else 'edited' end as outcome
from dead_letters
where change_id = any($1::uuid[]) and lane is not null
    and (status in ('open', 'replaying', 'discarded') or replaced_by is not null)
order by change_id, status in ('open', 'replaying') desc, last_failed_at desc
"""
_RETRYING = """
select r.change_id::text from retries r
join unnest($1::uuid[], $2::uuid[]) as requested (restaurant_id, change_id) using (restaurant_id, change_id)
"""
_RETRY_COUNTS = "select lane, count(*)::int8 from retries group by lane"
# The age is on the clock of PostgreSQL, which has written the row.
_CAME_THROUGH = """
select id::text, extract(epoch from now() - at)::float8 from heartbeats where id = any($1::uuid[])
"""

Key = tuple[str, str]
"""(restaurant id, change id)"""


async def synced(connection: Connection, changes: Sequence[Key]) -> dict[str, tuple[int, int]]:
    """Returns change id -> (xid, seq) of those changes that PostgreSQL has."""
    return {row[0]: (row[1], row[2]) for row in await connection.fetch(_SYNCED, *_columns(changes))}


async def dead(connection: Connection, changes: Sequence[str]) -> dict[str, str]:
    """Returns change id -> open, replaying, discarded or edited, for changes with a dead letter."""
    return {row[0]: row[1] for row in await connection.fetch(_DEAD, list(changes))}


async def retrying(connection: Connection, changes: Sequence[Key]) -> set[str]:
    return {row[0] for row in await connection.fetch(_RETRYING, *_columns(changes))}


async def retry_counts(connection: Connection) -> dict[str, int]:
    """Returns lane -> number of changes that wait in its retry queues, according to PostgreSQL."""
    return {row[0]: row[1] for row in await connection.fetch(_RETRY_COUNTS)}


async def came_through(connection: Connection, heartbeats: Sequence[str]) -> dict[str, float]:
    """Returns id -> age in seconds of those heartbeats that have come through their lanes."""
    return {row[0]: row[1] for row in await connection.fetch(_CAME_THROUGH, list(heartbeats))}


def _columns(changes: Sequence[Key]) -> tuple[list[str], list[str]]:
    return [restaurant for restaurant, _ in changes], [change for _, change in changes]
