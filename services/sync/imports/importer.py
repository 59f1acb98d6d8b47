"""Bringing the orders of another system in, through the background lane: new orders are not delayed by it.

Guarantee: every row is accepted or refused with its line and reason, and an order is there once however often its row
comes. How far it has come, and what was refused, is noted in PostgreSQL after each block whose rows are all recorded;
what is interrupted goes on from there, and a block that is done again changes nothing. While a backend is away it
waits, for a minute.

It keeps in step with PostgreSQL, and rests: a block begins when the last one has come there and as long again has
gone by. So what is under way of it is little at any moment, and new orders find the worker and the machine free; on one
that is busy with them it rests longer.
"""

import asyncio
import contextlib
import hashlib
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar
from uuid import UUID

from msgspec import Struct

from services.sync.imports.external_order_upserts import ExternalOrderUpserts, UpsertedOrder
from services.sync.imports.external_orders import ExternalOrder, order_id
from services.sync.imports.sources import ImportRow, ImportSource, rows
from shared.entities import order as orders
from shared.entities.contract import Lane
from shared.errors import Conflict, OutcomeUnknown, TicketrailError, Unavailable
from shared.postgres import states
from shared.postgres.pool import UNAVAILABLE, Postgres

# Measured by benchmarks/importing.py on a machine that was busy otherwise: with twice as many of each a new order took
# nearly twice as long, and the import was no faster. Those that are at once share a message, which makes each cheap.
_BLOCK = 100
_AT_ONCE = 32
_REST = 1.0
_IN_STEP_SECONDS = 2.0
_PATIENCE_SECONDS = 60.0
_SKIPPED_AT_ONCE = 1_000
_LONGEST_REASON = 500
T = TypeVar("T")

_BEGIN = (
    "insert into imports (source_sha256, source, restaurant_id) values ($1, $2, $3)"
    " on conflict (source_sha256) do update set updated_at = now()"
    " returning done, refused, passed_sha256"
)
_NOTE = "update imports set done = $2, refused = $3, passed_sha256 = $4, updated_at = now() where source_sha256 = $1"
_REFUSE = (
    "insert into import_refusals (source_sha256, line, reason)"
    " select $1, * from unnest($2::bigint[], $3::text[])"
    " on conflict (source_sha256, line) do update set reason = excluded.reason"
)
_REFUSED = "select line, reason from import_refusals where source_sha256 = $1 order by line"
_FINISH = "update imports set finished_at = now(), updated_at = now() where source_sha256 = $1"
_FORGET = "delete from imports where source_sha256 = $1"
_NOWHERE = "00000000-0000-0000-0000-000000000000"


class RefusedRow(Struct, frozen=True):
    line: int
    reason: str


class ImportReport(Struct):
    read: int = 0
    skipped: int = 0
    """Done by an earlier run."""
    created: int = 0
    updated: int = 0
    unchanged: int = 0
    refused: int = 0


class _Begun(Struct, frozen=True):
    digest: str
    done: int
    refused: int
    passed: str
    """Digest of the rows that are done: those of a database may be others now."""


class Importer:
    def __init__(self, postgres: Postgres, upserts: ExternalOrderUpserts) -> None:
        """`postgres` as the writer role."""
        self._postgres = postgres
        self._upserts = upserts

    async def run(
        self, source: ImportSource, restaurant: str | None, *, again: bool, progress: Callable[[ImportReport], None]
    ) -> tuple[ImportReport, list[RefusedRow]]:
        """`again`: from the beginning, also when it was done before. What was refused by earlier runs is told too.
        Raises NotFound (no such restaurant), InvalidInput (the source cannot be read), Unavailable, OutcomeUnknown or
        one of AWAY when a backend stays away: what is done stays noted."""
        if restaurant is not None:
            await _patiently(lambda: self._upserts.restaurant(restaurant))
        digest = f"{await asyncio.to_thread(lambda: source.digest)}:{restaurant or ''}"
        begun = await _patiently(lambda: self._begin(digest, source, restaurant, again=again))
        report = await self._bring(source, restaurant, begun, progress)
        while report is None:
            begun = await _patiently(lambda: self._begin(digest, source, restaurant, again=True))
            report = await self._bring(source, restaurant, begun, progress)
        await _patiently(lambda: self._execute(_FINISH, digest))
        progress(report)
        return report, await _patiently(lambda: self._refusals(digest))

    async def _bring(
        self, source: ImportSource, restaurant: str | None, begun: _Begun, progress: Callable[[ImportReport], None]
    ) -> ImportReport | None:
        """None: the source is not what it was when its first rows were done."""
        report = ImportReport(refused=begun.refused)
        passed = hashlib.sha256()
        block: list[ImportRow] = []
        async with contextlib.aclosing(rows(source, restaurant)) as found:
            async for row in found:
                report.read += 1
                if source.kind == "postgres":  # a file is known by its content
                    passed.update(row.digest)
                if report.read <= begun.done:
                    report.skipped += 1
                    if report.read == begun.done and passed.hexdigest() != begun.passed:
                        return None
                    if report.skipped % _SKIPPED_AT_ONCE == 0:
                        progress(report)
                    continue
                block.append(row)
                if len(block) == _BLOCK:
                    began = time.monotonic()
                    last = await self._bring_block(begun.digest, block, passed.hexdigest(), report)
                    progress(report)
                    block = []
                    await self._in_step(last)
                    await asyncio.sleep(_REST * (time.monotonic() - began))
        if report.read < begun.done:
            return None
        if block:
            await self._bring_block(begun.digest, block, passed.hexdigest(), report)
        return report

    async def _bring_block(
        self, digest: str, block: Sequence[ImportRow], passed: str, report: ImportReport
    ) -> UpsertedOrder | None:
        """Returns the last change that it made."""
        refused = [RefusedRow(row.line, row.error) for row in block if row.order is None]
        report.refused += len(refused)
        chains: dict[tuple[UUID, str], list[tuple[int, ExternalOrder]]] = {}
        for row in block:
            if row.order is not None:
                chains.setdefault((row.order.restaurant_id, row.order.name), []).append((row.line, row.order))
        firsts = [chain[0][1] for chain in chains.values()]
        new = await _patiently(lambda: self._upserts.unknown(firsts))
        gate = asyncio.Semaphore(_AT_ONCE)

        async def bring(chain: list[tuple[int, ExternalOrder]]) -> UpsertedOrder | None:
            """Rows of one order, one after the other."""
            last = None
            for line, order in chain:
                try:
                    done = await _patiently(lambda order=order: self._upsert(order, new))  # type: ignore[misc]
                except (Unavailable, OutcomeUnknown):
                    raise
                except TicketrailError as error:
                    field = error.details.get("field")
                    refused.append(RefusedRow(line, f"{field}: {error.message}" if field else error.message))
                    report.refused += 1
                else:
                    setattr(report, done.outcome, getattr(report, done.outcome) + 1)
                    last = last if done.outcome == "unchanged" else done
            return last

        async def gated(chain: list[tuple[int, ExternalOrder]]) -> UpsertedOrder | None:
            async with gate:
                return await bring(chain)

        brought = await asyncio.gather(*map(gated, chains.values()))
        await _patiently(lambda: self._note(digest, report, passed, refused))
        return next((one for one in reversed(brought) if one is not None), None)

    async def _upsert(self, order: ExternalOrder, new: set[str]) -> UpsertedOrder:
        id_ = order_id(str(order.restaurant_id), order.name)
        is_new = id_ in new
        new.discard(id_)  # what is asked again may have been done
        return await self._upserts.upsert(order, lane=Lane.BACKGROUND, new=is_new)

    async def _in_step(self, last: UpsertedOrder | None) -> None:
        """Waits until PostgreSQL has it. Not for ever: a worker that is stopped does not stop an import."""
        deadline = time.monotonic() + _IN_STEP_SECONDS
        while last is not None and time.monotonic() < deadline:
            order = last.order
            with contextlib.suppress(*UNAVAILABLE):
                async with self._postgres.connection() as connection:
                    found = await states.heads(connection, orders.ENTITY, order.restaurant_id, [order.id])
                if (known := found.get(order.id)) is not None and known >= last.head:
                    return
            await asyncio.sleep(0.02)

    # -- what is noted -----------------------------------------------------------------------------------------

    async def _begin(self, digest: str, source: ImportSource, restaurant: str | None, *, again: bool) -> _Begun:
        async with self._postgres.connection() as connection, connection.transaction():
            if again:
                await connection.execute(_FORGET, digest)
            row = await connection.fetchrow(_BEGIN, digest, source.shown, restaurant or _NOWHERE)
        assert row is not None
        return _Begun(digest, row["done"], row["refused"], row["passed_sha256"])

    async def _note(self, digest: str, report: ImportReport, passed: str, refused: Sequence[RefusedRow]) -> None:
        async with self._postgres.connection() as connection, connection.transaction():
            await connection.execute(_NOTE, digest, report.read, report.refused, passed)
            if refused:
                reasons = [_storable(one.reason) for one in refused]
                await connection.execute(_REFUSE, digest, [one.line for one in refused], reasons)

    async def _refusals(self, digest: str) -> list[RefusedRow]:
        async with self._postgres.connection() as connection:
            return [RefusedRow(row["line"], row["reason"]) for row in await connection.fetch(_REFUSED, digest)]

    async def _execute(self, statement: str, *arguments: str) -> None:
        async with self._postgres.connection() as connection:
            await connection.execute(statement, *arguments)


async def _patiently(work: Callable[[], Awaitable[T]]) -> T:
    """What a backend cannot do now is asked again: the same, so that nothing is doubled."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return await work()
        except (Unavailable, OutcomeUnknown, *UNAVAILABLE):
            if time.monotonic() > deadline:
                raise
        except Conflict as error:
            # A change of its own that is in doubt stands in the way until somebody finishes it.
            if error.error_code != "version_conflict" or time.monotonic() > deadline:
                raise
        await asyncio.sleep(random.uniform(0.5, 1.0))  # noqa: S311  (jitter)


def _storable(reason: str) -> str:
    """It may repeat a piece of the row."""
    return reason.replace("\x00", "?").encode(errors="replace").decode()[:_LONGEST_REASON]
