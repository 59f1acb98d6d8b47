"""How changes failed last: what readers of an entity see while its change waits for a retry or is dead.

Reads `retries` and `dead_letters`. Works for every role that sees both.
"""

from collections.abc import Sequence
from datetime import datetime

from msgspec import Struct

from shared.postgres.pool import Connection

_FAILED = """
select r.change_id::text, r.error, r.attempt as attempts, r.failed_at from retries r
join unnest($1::uuid[], $2::uuid[]) as wanted (restaurant_id, change_id) using (restaurant_id, change_id)
union all
select l.change_id::text, l.error, json_array_length(l.attempts), l.last_failed_at from dead_letters l
join unnest($1::uuid[], $2::uuid[]) as wanted (restaurant_id, change_id) using (restaurant_id, change_id)
where l.lane is not null and l.status in ('open', 'replaying')
order by failed_at
"""


class LastFailure(Struct, frozen=True):
    """The last failure of a change that is on the retry ladder or dead."""

    error: str
    attempts: int
    last_attempt: datetime


async def last_failures(connection: Connection, changes: Sequence[tuple[str, str]]) -> dict[str, LastFailure]:
    """Change id -> its last failure, for those that are on the retry ladder or whose dead letter is not resolved.

    `changes`: (restaurant id, change id) each."""
    restaurants, ids = [restaurant for restaurant, _ in changes], [change for _, change in changes]
    rows = await connection.fetch(_FAILED, restaurants, ids)
    return {row["change_id"]: LastFailure(row["error"], row["attempts"], row["failed_at"]) for row in rows}
