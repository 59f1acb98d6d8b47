"""The probe of the heartbeats does not wait for a frozen PostgreSQL, and asks it once."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest

from services.sync.api import HeartbeatProbe
from shared.postgres.pool import Postgres

ROWS = [{"lane": "critical", "sent_at": None}]


class FrozenPostgres:
    def __init__(self) -> None:
        self.queries = 0
        self.thawed = asyncio.Event()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator["FrozenPostgres"]:
        yield self

    async def fetch(self, _: str) -> list[Any]:
        self.queries += 1
        await self.thawed.wait()
        return ROWS


async def test_probes_of_a_frozen_postgres_time_out_and_share_one_query() -> None:
    postgres = FrozenPostgres()
    probe = HeartbeatProbe(cast(Postgres, postgres))
    for _ in range(2):
        with pytest.raises(TimeoutError, match="PostgreSQL did not answer within 1 s"):
            await probe.read()
    assert postgres.queries == 1
    postgres.thawed.set()
    assert await probe.read() == ROWS
    assert await probe.read() == ROWS
    assert postgres.queries <= 3
