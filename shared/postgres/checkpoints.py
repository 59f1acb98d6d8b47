"""Checkpoints: the table says up to where the change log and the feed agree. The leader of the ledger writes one every
few seconds (services/sync/ledger/ledger_loop.py); a reader that has lost its position begins at one.

A checkpoint holds as long as the log proves its `log_at`, because a log loses only its end.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from msgspec import Struct

from shared.entities.contract import encode
from shared.messaging.position import LogPosition
from shared.postgres.pool import Connection

BEFORE_LOG = LogPosition(-1, 0)
"""The position before the first entry of a log."""

_COLUMNS = (
    "id::text, log_low, log_low_crc, log_at, log_at_crc, feed_xid, feed_seq, counts::text, at,"
    " extract(epoch from now() - at)::float8 as age_seconds"
)
_LAST = f"select {_COLUMNS} from checkpoints order by xid desc limit 1"  # noqa: S608  (the columns above)
_FIRST_AFTER = f"select {_COLUMNS} from checkpoints where log_low >= $1 order by xid limit 1"  # noqa: S608
# The newest ones, and of the older ones one for each minute.
_CANDIDATES = f"""
select {_COLUMNS} from checkpoints where xid in (
    (select xid from checkpoints where $2::timestamptz is null or at <= $2 order by xid desc limit 3)
    union
    (select distinct on (date_trunc('minute', at)) xid from checkpoints where $2::timestamptz is null or at <= $2
    order by date_trunc('minute', at) desc, xid limit $1)
) order by xid desc
"""  # noqa: S608  (the columns above)
_APPEND = """
insert into checkpoints (log_low, log_low_crc, log_at, log_at_crc, feed_xid, feed_seq, counts)
select $2, $3, $4, $5, $6::text::xid8, $7, $8::text::json
where $1::uuid is not distinct from (select id from checkpoints order by xid desc limit 1)
returning id::text
"""
_PRUNE = """
delete from checkpoints c
where c.at < now() - interval '10 minutes' and exists(
    select from checkpoints earlier
    where date_trunc('minute', earlier.at) = date_trunc('minute', c.at) and earlier.xid < c.xid
) or c.at < now() - make_interval(days => $1)
"""


class Checkpoint(Struct, frozen=True):
    id: str
    log_low: LogPosition
    """Log entries up to this one are in `changes`, or dead."""
    log_at: LogPosition
    """The last log entry that was read."""
    feed_xid: int
    feed_seq: int
    """The log up to `log_at` has all changes up to (feed_xid, feed_seq). No later change is in the log before
    `log_low`."""
    counts: str = "{}"
    """The counts of the leader (LedgerTotals), as JSON."""
    at: datetime | None = None
    age_seconds: float = 0.0
    """The time of the read, by the clock of PostgreSQL."""


async def last_checkpoint(connection: Connection) -> Checkpoint | None:
    row = await connection.fetchrow(_LAST)
    return None if row is None else _checkpoint(row)


async def list_checkpoints(
    connection: Connection, *, limit: int = 20, until: datetime | None = None
) -> list[Checkpoint]:
    """Returns checkpoints to try, newest first: the newest ones, and about `limit` older ones. `until`: leaves out
    those that were written later."""
    return [_checkpoint(row) for row in await connection.fetch(_CANDIDATES, limit, until)]


async def first_checkpoint(connection: Connection, offset: int) -> Checkpoint | None:
    """Returns the oldest checkpoint whose `log_low` is at this offset or later."""
    row = await connection.fetchrow(_FIRST_AFTER, offset)
    return None if row is None else _checkpoint(row)


async def append_checkpoint(
    connection: Connection,
    after: str | None,
    *,
    log_low: LogPosition,
    log_at: LogPosition,
    feed: tuple[int, int],
    counts: Any,
) -> str | None:
    """Writes a checkpoint that follows `after`, the last one of the writer. Returns its id, or None if another one is
    the last: another leader has written it, or PostgreSQL has lost the one of the writer. `connection`: holds the lock
    of the leader. `counts`: encoded as JSON."""
    found: str | None = await connection.fetchval(
        _APPEND, after, *log_low, *log_at, str(feed[0]), feed[1], encode(counts).decode()
    )
    return found


async def prune_checkpoints(connection: Connection, *, days: int) -> int:
    """Deletes the checkpoints older than ten minutes except one per minute, and all that are older than `days`. Returns
    their number."""
    return int((await connection.execute(_PRUNE, days)).rpartition(" ")[2])


def positions(checkpoints: Sequence[Checkpoint], name: str) -> list[LogPosition]:
    """Returns the positions `log_low` or `log_at` of checkpoints, without those before the first entry."""
    found: list[LogPosition] = [getattr(one, name) for one in checkpoints]
    return [position for position in dict.fromkeys(found) if position != BEFORE_LOG]


def _checkpoint(row: Any) -> Checkpoint:
    return Checkpoint(
        row["id"],
        LogPosition(row["log_low"], row["log_low_crc"]),
        LogPosition(row["log_at"], row["log_at_crc"]),
        row["feed_xid"],
        row["feed_seq"],
        row["counts"],
        row["at"],
        row["age_seconds"],
    )
