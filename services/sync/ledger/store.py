"""Where changes are, by their ids: what PostgreSQL knows of a set of changes, for ledger.py.

Read as the ops role, which sees every tenant. Sets are asked for in one statement of so many ids; keep them to a few
thousand."""

from collections.abc import Sequence
from datetime import datetime

from msgspec import Struct

from shared.postgres.pool import Connection

_SYNCED = """
select c.change_id::text from changes c
join unnest($1::uuid[], $2::uuid[]) as wanted (restaurant_id, change_id) using (restaurant_id, change_id)
"""
# A letter of the mirror writer says nothing of the way to PostgreSQL. One that is resolved and was replaced by nothing
# was replayed: then `changes` has it, or it is gone. A letter may not know its restaurant: by the change alone.
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
join unnest($1::uuid[], $2::uuid[]) as wanted (restaurant_id, change_id) using (restaurant_id, change_id)
"""
_ON_THE_LADDER = "select lane, count(*)::int8 from retries group by lane"
_HEARTBEATS = "select lane, epoch, sent_at from heartbeats"
_SUCCESSORS = """
select distinct on (c.base_change_id) c.base_change_id::text, c.change_id::text
from changes c join unnest($1::uuid[], $2::uuid[]) as lost (restaurant_id, change_id)
    on c.restaurant_id = lost.restaurant_id and c.base_change_id = lost.change_id
order by c.base_change_id, c.version
"""
_LETTERS = "select digest from dead_letters where digest = any($1::bytea[])"
_RESTAURANTS = "select id::text, slug from restaurants"

Key = tuple[str, str]
"""(restaurant id, change id)"""


class LastHeartbeat(Struct, frozen=True):
    """The last one that came out of a lane."""

    epoch: str
    sent_at: datetime


async def synced(connection: Connection, changes: Sequence[Key]) -> set[str]:
    """Those that are in `changes`."""
    return {row[0] for row in await connection.fetch(_SYNCED, *_columns(changes))}


async def dead(connection: Connection, changes: Sequence[str]) -> dict[str, str]:
    """Change id -> open, replaying, discarded or edited: of those that a dead letter explains."""
    return {row[0]: row[1] for row in await connection.fetch(_DEAD, list(changes))}


async def retrying(connection: Connection, changes: Sequence[Key]) -> set[str]:
    return {row[0] for row in await connection.fetch(_RETRYING, *_columns(changes))}


async def on_the_ladder(connection: Connection) -> dict[str, int]:
    """Lane -> how many changes PostgreSQL knows to be on its retry queues."""
    return {row[0]: row[1] for row in await connection.fetch(_ON_THE_LADDER)}


async def heartbeats(connection: Connection) -> dict[str, LastHeartbeat]:
    return {row["lane"]: LastHeartbeat(row["epoch"], row["sent_at"]) for row in await connection.fetch(_HEARTBEATS)}


async def successors(connection: Connection, changes: Sequence[Key]) -> dict[str, str]:
    """Change id -> the change that was built on it: that one carries the whole state, so that only the step is lost."""
    return {row[0]: row[1] for row in await connection.fetch(_SUCCESSORS, *_columns(changes))}


async def letters(connection: Connection, digests: Sequence[bytes]) -> set[bytes]:
    """Those of which there is a dead letter, whatever has become of it."""
    return {row[0] for row in await connection.fetch(_LETTERS, list(digests))}


async def slugs(connection: Connection) -> dict[str, str]:
    """Restaurant id -> its short name."""
    return {row[0]: row[1] for row in await connection.fetch(_RESTAURANTS)}


def _columns(changes: Sequence[Key]) -> tuple[list[str], list[str]]:
    return [restaurant for restaurant, _ in changes], [change for _, change in changes]
