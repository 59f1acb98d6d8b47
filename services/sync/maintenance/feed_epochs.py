"""Epochs of the pull feed. Its cursor is (xid, seq) in `changes`, which the database counts: a restored database counts
them again, and an older cursor would skip new changes. Every cursor therefore carries the epoch in which it was given,
and a cursor of another epoch is answered with a resync.
"""

from shared.postgres.pool import Connection

_PRESENT = "select epoch from feed_epochs order by id desc limit 1"
_BEGIN = "insert into feed_epochs (why) values ($1) returning epoch"


async def present(connection: Connection) -> str:
    epoch: str = await connection.fetchval(_PRESENT)
    return epoch


async def begin(connection: Connection, why: str) -> str:
    """Begins a new epoch, which makes every older cursor void. `connection`: of the writer role."""
    epoch: str = await connection.fetchval(_BEGIN, why)
    return epoch
