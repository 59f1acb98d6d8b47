"""Imports the orders of another system through the background lane, so that new orders are not delayed.

Guarantee: every row is accepted, or refused with its line and reason. An accepted row becomes one order, however often
it is read. Progress and refused rows are stored in PostgreSQL after each block, when all its rows are recorded. An
interrupted import continues there, and repeating a block changes nothing. While a backend is unavailable, the import
waits for at most a minute.

The import does not run ahead of PostgreSQL. After each block it waits until PostgreSQL has the block, and then pauses
for as long as the block took. Therefore only a few changes of an import are in the lanes at any moment, and the import
pauses longer on a machine that is busy with new orders.
"""

import asyncio
import contextlib
import hashlib
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeVar
from uuid import UUID

from msgspec import Struct

from services.sync.imports.external_order_upserts import ExternalOrderUpserts, UpsertedOrder
from services.sync.imports.external_orders import ExternalOrder, order_id
from services.sync.imports.forecast import ImportForecast
from services.sync.imports.sources import CheckedSource, ImportRow, rows
from shared.entities import order as orders
from shared.entities.contract import Lane
from shared.errors import Conflict, OutcomeUnknown, TicketrailError, Unavailable
from shared.postgres import states
from shared.postgres.pool import UNAVAILABLE, Postgres
from shared.restaurants import Restaurant

# Measured by benchmarks/importing.py on a machine with other load: twice the block size and twice the concurrency made
# new orders nearly twice as slow and the import no faster. Concurrent rows share a message, so each row costs little.
_BLOCK_SIZE = 100
_CONCURRENCY = 32
_PAUSE_SHARE = 1.0
"""The pause after a block, as a multiple of the time that the block took."""
_SYNC_TIMEOUT_SECONDS = 2.0
_SYNC_INTERVAL_SECONDS = 0.02
_RETRY_TIMEOUT_SECONDS = 60.0
_SKIP_REPORT_INTERVAL = 1_000
"""The number of skipped rows between two calls of `progress`."""
_MAX_REASON_CHARS = 500
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
_NO_RESTAURANT = "00000000-0000-0000-0000-000000000000"


class RefusedRow(Struct, frozen=True):
    line: int
    reason: str


class ImportReport(Struct):
    read: int = 0
    skipped: int = 0
    """Rows that an earlier run imported."""
    created: int = 0
    updated: int = 0
    unchanged: int = 0
    refused: int = 0


class _Begun(Struct, frozen=True):
    digest: str
    done: int
    refused: int
    passed: str
    """The digest of the rows that are done. It shows whether a database returns the same rows again."""


class Importer:
    def __init__(self, postgres: Postgres, upserts: ExternalOrderUpserts) -> None:
        """`postgres`: a pool of the writer role."""
        self._postgres = postgres
        self._upserts = upserts

    async def run(
        self, checked: CheckedSource, *, again: bool, progress: Callable[[ImportReport], None]
    ) -> tuple[ImportReport, list[RefusedRow]]:
        """Imports the source. Returns the report and all refused rows, including those of earlier runs. `again`: starts
        from the first row, even if an earlier run imported it. Raises NotFound (no such restaurant) and InvalidInput
        (the source cannot be read). Raises Unavailable, OutcomeUnknown or one of UNAVAILABLE if a backend stays
        unavailable; the progress is kept then."""
        await self._require_restaurant(checked)
        begun = await _with_retries(lambda: self._begin(checked, again=again))
        report = await self._import_rows(checked, begun, progress)
        while report is None:
            begun = await _with_retries(lambda: self._begin(checked, again=True))
            report = await self._import_rows(checked, begun, progress)
        await _with_retries(lambda: self._execute(_FINISH, checked.digest))
        progress(report)
        return report, await _with_retries(lambda: self._refusals(checked.digest))

    async def forecast(
        self, checked: CheckedSource, *, progress: Callable[[ImportReport], None]
    ) -> tuple[ImportReport, list[RefusedRow]]:
        """Returns the report and the refused rows that `run` with `again` would return, and changes nothing. Raises the
        errors of `run`."""
        await self._require_restaurant(checked)
        report = ImportReport()
        refused: list[RefusedRow] = []
        async with contextlib.aclosing(rows(checked, self._restaurant)) as found:
            with ImportForecast(self._upserts) as forecast:
                async for block in _blocks(found):
                    orders_ = [row.order for row in block if row.order is not None]
                    await _with_retries(lambda orders_=orders_: forecast.look_up(orders_))  # type: ignore[misc]
                    for row in block:
                        report.read += 1
                        done = row.error if row.order is None else await self._outcome(forecast, row.order)
                        if done in ("created", "updated", "unchanged"):
                            setattr(report, done, getattr(report, done) + 1)
                        else:
                            report.refused += 1
                            refused.append(RefusedRow(row.line, _storable(done)))
                    progress(report)
        return report, sorted(refused, key=lambda row: row.line)

    async def _outcome(self, forecast: ImportForecast, order: ExternalOrder) -> str:
        """Returns the outcome that `upsert` would have, or the reason why it would refuse the order."""
        try:
            return await _with_retries(lambda: forecast.outcome(order))
        except (Unavailable, OutcomeUnknown):
            raise
        except TicketrailError as error:
            return _reason(error)

    async def _restaurant(self, id_: str) -> Restaurant:
        return await _with_retries(lambda: self._upserts.restaurant(id_))

    async def _require_restaurant(self, checked: CheckedSource) -> None:
        if checked.restaurant is not None:
            await self._restaurant(checked.restaurant)

    async def _import_rows(
        self, checked: CheckedSource, begun: _Begun, progress: Callable[[ImportReport], None]
    ) -> ImportReport | None:
        """Imports the rows after those that are done. Returns None if the rows that are done have changed in the
        source."""
        report = ImportReport(refused=begun.refused)
        passed = hashlib.sha256()
        block: list[ImportRow] = []
        async with contextlib.aclosing(rows(checked, self._restaurant)) as found:
            async for row in found:
                report.read += 1
                # The digest of the source covers the rows of a file, but only the text of a query.
                if checked.file is None:
                    passed.update(row.digest)
                if report.read <= begun.done:
                    report.skipped += 1
                    if report.read == begun.done and passed.hexdigest() != begun.passed:
                        return None
                    if report.skipped % _SKIP_REPORT_INTERVAL == 0:
                        progress(report)
                    continue
                block.append(row)
                if len(block) == _BLOCK_SIZE:
                    began = time.monotonic()
                    last = await self._import_block(begun.digest, block, passed.hexdigest(), report)
                    progress(report)
                    block = []
                    await self._wait_for_postgres(last)
                    await asyncio.sleep(_PAUSE_SHARE * (time.monotonic() - began))
        if report.read < begun.done:
            return None
        if block:
            await self._import_block(begun.digest, block, passed.hexdigest(), report)
        return report

    async def _import_block(
        self, digest: str, block: Sequence[ImportRow], passed: str, report: ImportReport
    ) -> UpsertedOrder | None:
        """Imports a block and stores the progress. Returns the last order that the block changed."""
        refused = [RefusedRow(row.line, row.error) for row in block if row.order is None]
        report.refused += len(refused)
        chains: dict[tuple[UUID, str], list[tuple[int, ExternalOrder]]] = {}
        for row in block:
            if row.order is not None:
                chains.setdefault((row.order.restaurant_id, row.order.name), []).append((row.line, row.order))
        firsts = [chain[0][1] for chain in chains.values()]
        new = await _with_retries(lambda: self._upserts.unknown(firsts))
        limit = asyncio.Semaphore(_CONCURRENCY)

        async def import_chain(chain: list[tuple[int, ExternalOrder]]) -> UpsertedOrder | None:
            """Imports the rows of one order, one after the other."""
            last = None
            for line, order in chain:
                try:
                    done = await _with_retries(lambda order=order: self._upsert(order, new))  # type: ignore[misc]
                except (Unavailable, OutcomeUnknown):
                    raise
                except TicketrailError as error:
                    refused.append(RefusedRow(line, _reason(error)))
                    report.refused += 1
                else:
                    setattr(report, done.outcome, getattr(report, done.outcome) + 1)
                    last = last if done.outcome == "unchanged" else done
            return last

        async def import_limited(chain: list[tuple[int, ExternalOrder]]) -> UpsertedOrder | None:
            async with limit:
                return await import_chain(chain)

        imported = await asyncio.gather(*map(import_limited, chains.values()))
        await _with_retries(lambda: self._note(digest, report, passed, refused))
        return next((order for order in reversed(imported) if order is not None), None)

    async def _upsert(self, order: ExternalOrder, new: set[str]) -> UpsertedOrder:
        id_ = order_id(str(order.restaurant_id), order.name)
        is_new = id_ in new
        new.discard(id_)  # a retry must read the order, because the first attempt may have committed it
        return await self._upserts.upsert(order, lane=Lane.BACKGROUND, new=is_new)

    async def _wait_for_postgres(self, last: UpsertedOrder | None) -> None:
        """Waits until PostgreSQL has the order, at most _SYNC_TIMEOUT_SECONDS, so that a stopped worker does not stop
        an import."""
        deadline = time.monotonic() + _SYNC_TIMEOUT_SECONDS
        while last is not None and time.monotonic() < deadline:
            order = last.order
            with contextlib.suppress(*UNAVAILABLE):
                async with self._postgres.connection() as connection:
                    found = await states.heads(connection, orders.ENTITY, order.restaurant_id, [order.id])
                if (known := found.get(order.id)) is not None and known >= last.head:
                    return
            await asyncio.sleep(_SYNC_INTERVAL_SECONDS)

    # -- progress ---------------------------------------------------------------------------------------------

    async def _begin(self, checked: CheckedSource, *, again: bool) -> _Begun:
        digest = checked.digest
        async with self._postgres.connection() as connection, connection.transaction():
            if again:
                await connection.execute(_FORGET, digest)
            row = await connection.fetchrow(_BEGIN, digest, checked.source.shown, checked.restaurant or _NO_RESTAURANT)
        assert row is not None
        return _Begun(digest, row["done"], row["refused"], row["passed_sha256"])

    async def _note(self, digest: str, report: ImportReport, passed: str, refused: Sequence[RefusedRow]) -> None:
        async with self._postgres.connection() as connection, connection.transaction():
            await connection.execute(_NOTE, digest, report.read, report.refused, passed)
            if refused:
                reasons = [_storable(row.reason) for row in refused]
                await connection.execute(_REFUSE, digest, [row.line for row in refused], reasons)

    async def _refusals(self, digest: str) -> list[RefusedRow]:
        async with self._postgres.connection() as connection:
            return [RefusedRow(row["line"], row["reason"]) for row in await connection.fetch(_REFUSED, digest)]

    async def _execute(self, statement: str, *arguments: str) -> None:
        async with self._postgres.connection() as connection:
            await connection.execute(statement, *arguments)


async def _with_retries(work: Callable[[], Awaitable[T]]) -> T:
    """Repeats `work` while a backend is unavailable. `work` must be idempotent."""
    deadline = time.monotonic() + _RETRY_TIMEOUT_SECONDS
    while True:
        try:
            return await work()
        except (Unavailable, OutcomeUnknown, *UNAVAILABLE):
            if time.monotonic() > deadline:
                raise
        except Conflict as error:
            # An earlier attempt with an unknown outcome may hold the claim until the claim finisher finishes it.
            if error.error_code != "version_conflict" or time.monotonic() > deadline:
                raise
        await asyncio.sleep(random.uniform(0.5, 1.0))  # noqa: S311  (jitter)


async def _blocks(found: AsyncIterator[ImportRow]) -> AsyncIterator[list[ImportRow]]:
    block: list[ImportRow] = []
    async for row in found:
        block.append(row)
        if len(block) == _BLOCK_SIZE:
            yield block
            block = []
    if block:
        yield block


def _reason(error: TicketrailError) -> str:
    field = error.details.get("field")
    return f"{field}: {error.message}" if field else error.message


def _storable(reason: str) -> str:
    """Returns the reason without characters that PostgreSQL cannot store. It may quote a part of the row."""
    return reason.replace("\x00", "?").encode(errors="replace").decode()[:_MAX_REASON_CHARS]
