"""Writes the table `retries`, which lists the changes on the retry ladder. The ledger needs it to account for changes
that are neither in `changes` nor dead letters.

A row is inserted after the broker has confirmed the change in its retry queue, and deleted in the transaction that
commits the change or stores its dead letter. The change may be committed before its row is inserted; `sweep` regularly
deletes such leftover rows. If PostgreSQL is unavailable, the row is not inserted. The change is in its retry queue
anyway, and only the ledger misses it.
"""

from collections.abc import Sequence
from datetime import datetime

from msgspec import Struct

from shared.postgres.pool import Connection

_NOTE = """
insert into retries as t (restaurant_id, change_id, lane, entity, entity_id, attempt, reason, error, failed_at)
select new.* from unnest($1::uuid[], $2::uuid[], $3::text[], $4::text[], $5::uuid[], $6::int4[], $7::text[], $8::text[],
    $9::timestamptz[]) as new (restaurant_id, change_id, lane, entity, entity_id, attempt, reason, error, failed_at)
where not exists (
    select from changes c where c.restaurant_id = new.restaurant_id and c.change_id = new.change_id
)
order by 1, 2
on conflict (restaurant_id, change_id) do update
set attempt = excluded.attempt, reason = excluded.reason, error = excluded.error, failed_at = excluded.failed_at
where excluded.failed_at > t.failed_at
"""
_FORGET = """
delete from retries r using unnest($1::uuid[], $2::uuid[]) as gone (restaurant_id, change_id)
where r.restaurant_id = gone.restaurant_id and r.change_id = gone.change_id
"""
_SWEEP = """
delete from retries r
where exists (select from changes c where c.restaurant_id = r.restaurant_id and c.change_id = r.change_id)
    or exists (
        select from dead_letters l
        where l.restaurant_id = r.restaurant_id and l.change_id = r.change_id and l.last_failed_at >= r.failed_at
    )
"""


class Retry(Struct, frozen=True, kw_only=True):
    restaurant_id: str
    change_id: str
    lane: str
    entity: str
    entity_id: str
    attempt: int
    reason: str
    error: str
    failed_at: datetime


async def note(connection: Connection, retries: Sequence[Retry]) -> None:
    """Inserts or updates the rows of changes that are in a retry queue now. Skips changes that are already in
    `changes`."""
    last = {(retry.restaurant_id, retry.change_id): retry for retry in retries}
    rows = list(last.values())
    await connection.execute(_NOTE, *([getattr(retry, name) for retry in rows] for name in Retry.__struct_fields__))


async def forget(connection: Connection, changes: Sequence[tuple[str, str]]) -> None:
    """Deletes the rows of changes that are committed or dead. `changes`: (restaurant id, change id)."""
    ordered = sorted(changes)
    await connection.execute(_FORGET, [restaurant for restaurant, _ in ordered], [change for _, change in ordered])


async def sweep(connection: Connection) -> int:
    """Deletes leftover rows and returns how many there were."""
    return int((await connection.execute(_SWEEP)).rpartition(" ")[2])
