"""How long does a new order take to reach PostgreSQL while an import runs?

`ticketrail import` runs as a process of its own and imports 20,000 of last year's orders at 50 restaurants through the
background lane. Meanwhile new orders arrive over HTTP at 20 per second, in an open loop. Latency counts from the moment
an order was due until a reader that polls PostgreSQL every few milliseconds sees it. Only orders that were due while
the import wrote rows count. The same load before the import shows what the import costs.
"""

import asyncio
import json
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
from msgspec import Struct

from benchmarks.load import SentOrder, open_loop, percentile
from benchmarks.question import BenchmarkPlan, ResultRow, compared
from benchmarks.rig import BenchmarkRig, RunningProgram
from benchmarks.rig import run as run_async

QUESTION = "importing"
_IMPORTED_ORDERS = 20_000
_ORDERS_PER_SECOND = 20
_ORDERING_RESTAURANTS = 4
"""Restaurants that take new orders."""
_CONNECTIONS = 8
_MAX_ROUNDS = 3
_MAX_LOAD_SECONDS = 1.0
"""The maximum length of one load during an import. The benchmark reads the progress of the import after each load."""
_POLL_INTERVAL_SECONDS = 0.003
_TIMEOUT_SECONDS = 60.0
"""The time limit for the import to start, and for all new orders to reach PostgreSQL."""
_SELECT_PRESENT = (
    "select o.id::text from unnest($1::uuid[]) as r (restaurant_id) cross join unnest($2::uuid[]) as i (id)"
    " join orders o using (restaurant_id, id)"
)


class ImportSlice(Struct, frozen=True):
    p50_ms: float
    p99_ms: float
    imported_per_second: float = 0.0


def run(rig: BenchmarkRig, plan: BenchmarkPlan) -> list[ResultRow]:
    without, during = [], []
    with rig.rail() as (orders, _):
        for number in range(min(plan.rounds, _MAX_ROUNDS)):
            file = rig.folder / f"history-{number}.jsonl"
            _write(rig, file, 2_000 if plan.quick else _IMPORTED_ORDERS)
            rig.wait_until_idle()
            without.append(run_async(_without_import(rig, plan, orders)))
            during.append(run_async(_during_import(rig, plan, orders, file)))
    case = f"{_ORDERS_PER_SECOND} orders/s during an import"
    note = f"the same load without an import: p50 {without[0].p50_ms:.1f} ms, p99 {without[0].p99_ms:.1f} ms"
    return [
        compared(QUESTION, case, "p50 into PostgreSQL", "ms", [one.p50_ms for one in during], at_most=100.0, note=note),
        compared(QUESTION, case, "p99 into PostgreSQL", "ms", [one.p99_ms for one in during]),
        compared(QUESTION, "the import", "throughput", "orders/s", [one.imported_per_second for one in during]),
        compared(QUESTION, "no import", "p50 into PostgreSQL", "ms", [one.p50_ms for one in without]),
    ]


def _write(rig: BenchmarkRig, file: Path, count: int) -> None:
    began = datetime(2025, 3, 1, 12, tzinfo=UTC)
    with file.open("w") as out:
        for number in range(count):
            restaurant = rig.restaurants[number % len(rig.restaurants)]
            dishes = restaurant.menu_item_ids
            out.write(
                json.dumps(
                    {
                        "restaurant_id": restaurant.id,
                        "external_id": f"{file.stem}-{number}",
                        "order_number": f"H{number}",
                        "status": "completed",
                        "items": [
                            {
                                "menu_item_id": dishes[(number + place) % len(dishes)],
                                "name": f"Dish {place}",
                                "quantity": 1 + place,
                                "unit_price": 500 + 75 * place,
                            }
                            for place in range(3)
                        ],
                        "payments": [{"id": "card", "amount": 4_000, "method": "card"}],
                        "created_at": (began + timedelta(seconds=30 * number)).isoformat(),
                    }
                )
                + "\n"
            )


async def _without_import(rig: BenchmarkRig, plan: BenchmarkPlan, orders: RunningProgram) -> ImportSlice:
    sent: list[SentOrder] = []
    watch = _DatabaseWatch(rig, sent)
    await watch.open()
    try:
        await _load(rig, orders, sent, plan.seconds)
        found = await watch.latencies(lambda _: True)
    finally:
        await watch.close()
    return ImportSlice(percentile(found, 0.5), percentile(found, 0.99))


async def _during_import(rig: BenchmarkRig, plan: BenchmarkPlan, orders: RunningProgram, file: Path) -> ImportSlice:
    sent: list[SentOrder] = []
    watch = _DatabaseWatch(rig, sent)
    await watch.open()
    before = await watch.imported(file)
    running = await asyncio.to_thread(
        rig.program,
        [sys.executable, "-m", "services.sync.cli", "import", file, "--json"],
        rig.environment(),
        0,
        name="import",
        ready="",
    )
    try:
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while before == await watch.imported(file):
            if running.child.returncode is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the import does not start:\n{running.child.tail(30)}")
            await asyncio.sleep(0.02)
        began, first_rows = time.monotonic(), await watch.imported(file)
        finished = asyncio.create_task(asyncio.to_thread(running.child.wait))
        while not finished.done():
            await _load(rig, orders, sent, min(plan.seconds, _MAX_LOAD_SECONDS))
            if not finished.done():
                ended_at, last_rows = time.monotonic(), await watch.imported(file)
        if await finished != 0:
            raise RuntimeError(f"the import failed:\n{running.child.tail(30)}")
        found = await watch.latencies(lambda one: began <= one.due < ended_at)
    finally:
        running.stop()
        await watch.close()
    return ImportSlice(percentile(found, 0.5), percentile(found, 0.99), (last_rows - first_rows) / (ended_at - began))


async def _load(rig: BenchmarkRig, orders: RunningProgram, sent: list[SentOrder], seconds: float) -> None:
    address = urlsplit(orders.url)
    await open_loop(
        str(address.hostname),
        int(address.port or 0),
        rig.restaurants[:_ORDERING_RESTAURANTS],
        per_second=_ORDERS_PER_SECOND,
        seconds=seconds,
        connections=_CONNECTIONS,
        into=sent,
    )


class _DatabaseWatch:
    """Polls PostgreSQL for the orders in `sent` and remembers when it first sees each one."""

    def __init__(self, rig: BenchmarkRig, sent: list[SentOrder]) -> None:
        self._url = rig.database_url("writer")
        self._restaurants = [one.id for one in rig.restaurants[:_ORDERING_RESTAURANTS]]
        self._sent = sent
        self._seen: dict[str, float] = {}

    async def open(self) -> None:
        self._connection = await asyncpg.connect(self._url)
        self._progress_connection = await asyncpg.connect(self._url)
        self._task = asyncio.create_task(self._poll())

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._connection.close()
        await self._progress_connection.close()

    async def imported(self, file: Path) -> int:
        """Returns how many rows of the file the import has finished."""
        return int(
            await self._progress_connection.fetchval(
                "select coalesce(max(done), 0) from imports where source = $1", str(file)
            )
        )

    async def latencies(self, counts: Callable[[SentOrder], bool]) -> list[float]:
        """Waits until PostgreSQL has all sent orders. Returns the milliseconds of the orders for which `counts` is
        true."""
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while len(self._seen) < len(self._sent):
            if self._task.done() or time.monotonic() > deadline:
                raise RuntimeError(f"{len(self._sent) - len(self._seen)} orders are not in PostgreSQL")
            await asyncio.sleep(0.05)
        return [(self._seen[one.order_id] - one.due) * 1000 for one in self._sent if counts(one)]

    async def _poll(self) -> None:
        while True:
            missing = [one.order_id for one in self._sent if one.order_id not in self._seen]
            if missing:
                rows = await self._connection.fetch(_SELECT_PRESENT, self._restaurants, missing)
                self._seen.update((row[0], time.monotonic()) for row in rows)
            await asyncio.sleep(_POLL_INTERVAL_SECONDS)
