"""Reads rows with values of up to 8 MB in blocks of a few megabytes, so that the memory of the reader is bounded."""

from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from shared.postgres.pool import Connection

if TYPE_CHECKING:
    import asyncpg

BLOCK_BYTES = 4 << 20
_FIRST_ROWS = 4
_MAX_ROWS = 250
_GROWTH = 4


async def in_blocks(
    connection: Connection, query: str, *arguments: Any, column: str
) -> AsyncGenerator[list["asyncpg.Record"], None]:
    """Yields the rows of a query in blocks of about BLOCK_BYTES, measured by the length of the text or bytes in
    `column`.

    PostgreSQL cannot limit a block by size, so the number of rows follows from the size of the block before. It grows
    by a factor of four at most, and a block has at most 250 rows. Runs in a transaction, whose snapshot is that of the
    first block.
    """
    async with connection.transaction(readonly=True):
        cursor = await connection.cursor(query, *arguments)
        count = _FIRST_ROWS
        while rows := await cursor.fetch(count):
            yield rows
            fitting = BLOCK_BYTES * len(rows) // max(1, sum(len(row[column]) for row in rows))
            count = max(1, min(fitting, _GROWTH * count, _MAX_ROWS))
