"""Reads rows with values of up to 8 MB in blocks or pages of a few megabytes, so that memory is bounded."""

from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Any

from shared.postgres.pool import Connection

if TYPE_CHECKING:
    import asyncpg

BLOCK_BYTES = 4 << 20
_FIRST_ROWS = 4
_MAX_ROWS = 250
_GROWTH = 4


def first_megabytes(selected: str, column: str, order: str) -> str:
    """Returns a query for the first rows of the query `selected`, sorted by `order`. The rows end with the one that
    brings the bytes in `column` to BLOCK_BYTES. A page of 200 states of one megabyte each would block a service for
    seconds.

    `order`: an `order by` clause for columns of `t`. Each row also has `found`, the number of rows of `selected`.
    """
    return (
        f"select * from (select t.*, count(*) over () as found, sum(octet_length(t.{column}::text)) over ({order}"  # noqa: S608
        f" rows between unbounded preceding and 1 preceding) as bytes from ({selected}) t) t"
        f" where coalesce(t.bytes, 0) < {BLOCK_BYTES} {order}"
    )


def left_out(rows: "Sequence[asyncpg.Record]") -> bool:
    """Returns whether the query of `first_megabytes` left out rows."""
    return bool(rows) and rows[0]["found"] > len(rows)


async def in_blocks(
    connection: Connection, query: str, *arguments: Any, column: str
) -> AsyncGenerator[list["asyncpg.Record"], None]:
    """Yields the rows of a query in blocks of about BLOCK_BYTES, measured by the length of the text or bytes in
    `column`.

    PostgreSQL cannot limit a block by size, so the number of rows follows from the size of the previous block. It grows
    by a factor of four at most, and a block has at most 250 rows. All blocks come from one cursor, so they show one
    snapshot.
    """
    async with connection.transaction(readonly=True):
        cursor = await connection.cursor(query, *arguments)
        count = _FIRST_ROWS
        while rows := await cursor.fetch(count):
            yield rows
            fitting = BLOCK_BYTES * len(rows) // max(1, sum(len(row[column]) for row in rows))
            count = max(1, min(fitting, _GROWTH * count, _MAX_ROWS))
