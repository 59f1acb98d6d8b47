"""Bringing the orders of another system in, through the background lane: new orders are not delayed by it.

Guarantee: every row is accepted or refused with its line and reason, and an order is there once however often its row
comes. How far it has come is noted in PostgreSQL after each block whose rows are all recorded; what is interrupted goes
on from there, and a block that is done again changes nothing.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from msgspec import Struct

from services.sync.rows import Row, Source, rows
from services.sync.upserts import Upserts
from shared.entities.contract import Lane
from shared.errors import OutcomeUnknown, TicketrailError, Unavailable
from shared.postgres.pool import Postgres

_BLOCK = 200
# Two cores are shared with those who take orders meanwhile.
_AT_ONCE = 16
_PATIENCE = 60

_BEGIN = (
    "insert into imports (source_sha256, source, restaurant_id) values ($1, $2, $3)"
    " on conflict (source_sha256) do update set updated_at = now()"
    " returning done, refused, finished_at"
)
_NOTE = "update imports set done = $2, refused = $3, updated_at = now() where source_sha256 = $1"
_FINISH = "update imports set finished_at = now(), updated_at = now() where source_sha256 = $1"
_FORGET = "delete from imports where source_sha256 = $1"
_NOWHERE = "00000000-0000-0000-0000-000000000000"


class Refused(Struct, frozen=True):
    line: int
    reason: str


class Report(Struct):
    read: int = 0
    skipped: int = 0
    """Done by an earlier run."""
    created: int = 0
    updated: int = 0
    unchanged: int = 0
    refused: int = 0


class Importer:
    def __init__(self, postgres: Postgres, upserts: Upserts) -> None:
        """`postgres` as the writer role."""
        self._postgres = postgres
        self._upserts = upserts

    async def run(
        self,
        source: Source,
        restaurant: str | None,
        *,
        again: bool,
        refused: Callable[[Refused], None],
        progress: Callable[[Report], None],
    ) -> Report:
        """`again`: from the beginning, also when it was done before. Raises Unavailable when a backend stays away for
        longer than a minute: what is done stays noted."""
        report, digest = Report(), f"{source.digest}:{restaurant or ''}"
        async with self._postgres.connection() as connection:
            if again:
                await connection.execute(_FORGET, digest)
            row = await connection.fetchrow(_BEGIN, digest, source.shown, restaurant or _NOWHERE)
            assert row is not None
        done, report.refused = row["done"], row["refused"]
        block: list[Row] = []
        async for one in rows(source, restaurant):
            report.read += 1
            if report.read <= done:
                report.skipped += 1
                if report.skipped % 1_000 == 0:
                    progress(report)
                continue
            block.append(one)
            if len(block) == _BLOCK:
                await self._bring(block, report, refused)
                await self._note(digest, report)
                progress(report)
                block = []
        await self._bring(block, report, refused)
        await self._note(digest, report)
        async with self._postgres.connection() as connection:
            await connection.execute(_FINISH, digest)
        progress(report)
        return report

    async def _note(self, digest: str, report: Report) -> None:
        async with self._postgres.connection() as connection:
            await connection.execute(_NOTE, digest, report.read, report.refused)

    async def _bring(self, block: list[Row], report: Report, refused: Callable[[Refused], None]) -> None:
        gate = asyncio.Semaphore(_AT_ONCE)

        async def one(row: Row) -> tuple[str, Refused | None]:
            if row.order is None:
                return "refused", Refused(row.line, row.error)
            async with gate:
                try:
                    return await self._patiently(row.order), None
                except (Unavailable, OutcomeUnknown):
                    raise
                except TicketrailError as error:
                    field = error.details.get("field")
                    return "refused", Refused(row.line, f"{field}: {error.message}" if field else error.message)

        for outcome, why in await asyncio.gather(*(one(row) for row in block)):
            setattr(report, outcome, getattr(report, outcome) + 1)
            if why is not None:
                refused(why)

    async def _patiently(self, order: Any) -> str:
        """What a backend could not take now is sent again: the same order, so that nothing is doubled."""
        for tried in range(_PATIENCE):
            try:
                return (await self._upserts.upsert(order, lane=Lane.BACKGROUND)).outcome
            except (Unavailable, OutcomeUnknown):
                if tried + 1 == _PATIENCE:
                    raise
            await asyncio.sleep(1.0)
        raise AssertionError("not reached")
