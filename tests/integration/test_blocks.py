"""Rows with large values are read in blocks of bounded size."""

from contextlib import aclosing

import asyncpg

from shared.postgres.blocks import BLOCK_BYTES, in_blocks
from tests.rigs.servers import Servers

_ROWS = """
select n, repeat('x', case when n <= $1::int then $2::int else $3::int end) as value
from generate_series(1, $4::int) n
"""
MIB = 1 << 20


async def blocks(servers: Servers, *arguments: int) -> list[list[tuple[int, int]]]:
    """Returns (number, size) of the rows of each block. `arguments`: the rows of the first size, that size, the size of
    the others, all rows."""
    connection = await asyncpg.connect(servers.postgres.superuser_url)
    try:
        async with aclosing(in_blocks(connection, _ROWS, *arguments, column="value")) as found:
            return [[(row["n"], len(row["value"])) for row in block] async for block in found]
    finally:
        await connection.close()


async def test_large_rows_come_in_blocks_of_a_few_megabytes(servers: Servers) -> None:
    found = await blocks(servers, 30, MIB, 8 * MIB, 34)
    assert [n for block in found for n, _ in block] == list(range(1, 35))
    of_1_mib = [sum(size for _, size in block) for block in found if block[-1][0] <= 30]
    assert max(of_1_mib) <= BLOCK_BYTES
    assert [len(block) for block in found][-2:] == [1, 1], "after a row of 8 MiB, each block has one row"


async def test_small_rows_come_in_blocks_of_many(servers: Servers) -> None:
    found = await blocks(servers, 1_000, 100, 100, 1_000)
    assert [len(block) for block in found] == [4, 16, 64, 250, 250, 250, 166]


async def test_a_query_without_rows_has_no_block(servers: Servers) -> None:
    assert await blocks(servers, 0, 1, 1, 0) == []
