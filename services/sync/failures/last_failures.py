"""Reads the last failure of changes. Readers of an entity see it while the change waits for a retry or is dead.

The sources are the tables `retries` and `dead_letters`. The connection may have any role that can read both.
"""

from collections.abc import Sequence
from datetime import datetime

from msgspec import Struct

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
