"""Finds changes in PostgreSQL by their ids, for ledger.py.

Connections have the ops role, which sees every tenant. Each call is one statement, so pass at most a few thousand ids.
"""

from collections.abc import Sequence
from datetime import datetime

from shared.postgres.pool import Connection

_SYNCED = """
select c.change_id::text from changes c
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
_HEARTBEATS = "select lane, sent_at from last_heartbeats"
_SUCCESSORS = """
select distinct on (c.base_change_id) c.base_change_id::text, c.change_id::text
from changes c join unnest($1::uuid[], $2::uuid[]) as lost (restaurant_id, change_id)
    on c.restaurant_id = lost.restaurant_id and c.base_change_id = lost.change_id
order by c.base_change_id, c.version
"""
_RESTAURANTS = "select id::text, slug from restaurants"

Key = tuple[str, str]
"""(restaurant id, change id)"""


async def synced(connection: Connection, changes: Sequence[Key]) -> set[str]:
    """Returns the ids of those changes that PostgreSQL has."""
    return {row[0] for row in await connection.fetch(_SYNCED, *_columns(changes))}


async def dead(connection: Connection, changes: Sequence[str]) -> dict[str, str]:
    """Returns change id -> open, replaying, discarded or edited, for changes with a dead letter."""
    return {row[0]: row[1] for row in await connection.fetch(_DEAD, list(changes))}


async def retrying(connection: Connection, changes: Sequence[Key]) -> set[str]:
    return {row[0] for row in await connection.fetch(_RETRYING, *_columns(changes))}


async def retry_counts(connection: Connection) -> dict[str, int]:
    """Returns lane -> number of changes that wait in its retry queues, according to PostgreSQL."""
    return {row[0]: row[1] for row in await connection.fetch(_RETRY_COUNTS)}


async def heartbeats(connection: Connection) -> dict[str, datetime]:
    """Returns lane -> sending time of the last heartbeat that came out of it."""
    return {row["lane"]: row["sent_at"] for row in await connection.fetch(_HEARTBEATS)}


async def successors(connection: Connection, changes: Sequence[Key]) -> dict[str, str]:
    """Returns change id -> id of a change in PostgreSQL that has this change as its base."""
    return {row[0]: row[1] for row in await connection.fetch(_SUCCESSORS, *_columns(changes))}


async def slugs(connection: Connection) -> dict[str, str]:
    """Returns restaurant id -> slug."""
    return {row[0]: row[1] for row in await connection.fetch(_RESTAURANTS)}


def _columns(changes: Sequence[Key]) -> tuple[list[str], list[str]]:
    return [restaurant for restaurant, _ in changes], [change for _, change in changes]
