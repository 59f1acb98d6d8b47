"""The epochs of the pull feed. A cursor of the feed is a position (xid, seq) in `changes`. A database that was restored
from a backup assigns these numbers again, so that an older cursor would skip new changes. Every cursor therefore
carries its epoch, and the answer to a cursor of another epoch is a resync.
"""

from shared.postgres.pool import Connection

_CURRENT = "select epoch from feed_epochs order by id desc limit 1"
_BEGIN = "insert into feed_epochs (why) values ($1) returning epoch"


async def current(connection: Connection) -> str:
    epoch: str = await connection.fetchval(_CURRENT)
    return epoch


async def begin(connection: Connection, why: str) -> str:
    """Begins a new epoch, so that all older cursors become invalid. Returns the epoch. `connection`: a
    connection of the writer role."""
    epoch: str = await connection.fetchval(_BEGIN, why)
    return epoch
