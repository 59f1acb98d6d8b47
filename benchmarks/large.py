"""Are a restaurant's reads as fast among a million orders as among ten thousand?

One server holds two databases with 200 restaurants each. COPY fills them as the writer would have left them
(history.py): one with 50 orders per restaurant, the other with 5,000, over the same 400 days. Each database has its own
orders service, and both services read the same mirror.

The load is a closed loop over 4 connections, to the two databases in turn. Successive requests ask for different
restaurants. Each read by id asks for a different order, which is too old for the mirror. Lists are pages of 20, so that
both sides return the same number of rows.
"""

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import asyncpg
from msgspec import Struct

from benchmarks.history import DAYS, History, PastRestaurant, fill
from benchmarks.load import percentile
from benchmarks.question import BenchmarkPlan, ResultRow, compared
from benchmarks.rig import SECRET, BenchmarkRig, RunningProgram, execute
from benchmarks.rig import run as run_async
from shared.entities import order
from shared.http.cursors import cursor_after
from shared.postgres import states
from shared.postgres.migrate import migrate
from shared.security.tokens import Identity, Role, Tokens
from shared.settings import Settings

QUESTION = "large"
_CONNECTIONS = 4
_REQUESTS_PER_SLICE = 1_000
"""The p99 is the latency of the tenth slowest request."""
_PAGE_ORDERS = 20
_ORDERS_AFTER_CURSOR = 25
"""Number of orders after the cursor, so that it requests the page before the last."""
_OLD_ORDERS = 80
"""Number of orders of each restaurant that are read by id."""
_CONTENT_LENGTH = re.compile(rb"(?i)content-length: (\d+)")
_MAX_P99_RATIO = 2.0
_MAX_CHECKPOINT_SECONDS = 60.0
"""The maximum wait for the checkpoint after the databases are filled."""
_LIVE_WINDOW = timedelta(days=3)

Paths = Callable[["FilledDatabase", int], str]


class ReadCase(Struct, frozen=True):
    name: str
    path: Paths
    """Returns the path of a request, from the database and the number of the request."""
    has_target: bool = True
    """True if the p99 has a target."""
    once: bool = False
    """True if each path is read only once, because a read puts the order into the mirror."""


class FilledDatabase(Struct):
    name: str
    restaurants: list[PastRestaurant]
    tokens: list[str]
    cursors: list[str]
    old_order_ids: list[list[str]]
    """Ids of orders that the mirror does not hold, per restaurant."""
    running: RunningProgram | None = None

    def table_id(self, number: int) -> str:
        """Returns the first table of the restaurant that request `number` asks for."""
        return self.restaurants[number % len(self.restaurants)].table_ids[0]

    def cursor(self, number: int) -> str:
        return self.cursors[number % len(self.cursors)]


def _orders(more: Callable[[FilledDatabase, int], str]) -> Paths:
    return lambda filled, number: f"/api/orders?limit={_PAGE_ORDERS}{more(filled, number)}"


def _old_order(filled: FilledDatabase, number: int) -> str:
    of_restaurant = filled.old_order_ids[number % len(filled.restaurants)]
    return f"/api/orders/{of_restaurant[number // len(filled.restaurants) % len(of_restaurant)]}"


def _summary(_: FilledDatabase, number: int) -> str:
    return "/api/orders/summary"


def _long_summary(_: FilledDatabase, number: int) -> str:
    today = datetime.now(UTC).date()
    return f"/api/orders/summary?from={today - timedelta(days=DAYS - 1)}&to={today}"


CASES = (
    ReadCase("orders, first page", _orders(lambda *_: "")),
    ReadCase("orders, page before the last", _orders(lambda filled, number: f"&cursor={filled.cursor(number)}")),
    ReadCase("orders by status", _orders(lambda *_: "&status=completed")),
    ReadCase("orders at a table", _orders(lambda filled, number: f"&table_id={filled.table_id(number)}")),
    ReadCase("an old order", _old_order, once=True),
    ReadCase("summary of 30 days", _summary),
    ReadCase("summary of 400 days", _long_summary),
    ReadCase("payments", lambda *_: f"/api/payments?limit={_PAGE_ORDERS}"),
    ReadCase("audit", lambda *_: f"/api/audit?limit={_PAGE_ORDERS}"),
    ReadCase("customers with their totals", lambda *_: f"/api/customers?limit={_PAGE_ORDERS}", has_target=False),
)  # fmt: skip


def run(rig: BenchmarkRig, plan: BenchmarkPlan) -> list[ResultRow]:
    restaurants, few, many = (20, 2_000, 10_000) if plan.quick else (200, 10_000, 1_000_000)
    filled = [_fill(rig, f"large_{orders}", restaurants, orders) for orders in (few, many)]
    try:
        rig.wait_until_idle(_MAX_CHECKPOINT_SECONDS)
        with rig.rail():
            for one in filled:
                one.running = rig.service("orders", database_api_url=rig.database_url("api", one.name))
            found = run_async(_measure(filled, plan))
            for one in filled:
                if one.running is not None:
                    one.running.stop()
        rebuilt = [run_async(_rebuild(rig, one.name, plan.rounds)) for one in filled]
    finally:
        for one in filled:
            execute(rig.postgres.superuser_url, f'drop database if exists "{one.name}" with (force)')
    peer = f"among {few:,}"
    rows = []
    for case in CASES:
        for share, metric in ((0.5, "p50"), (0.99, "p99")):
            small, large = ([percentile(one, share) for one in slices] for slices in found[case.name])
            at_most = _MAX_P99_RATIO if case.has_target and metric == "p99" else None
            rows.append(compared(QUESTION, case.name, metric, "ms", large, peer, small, at_most=at_most))
    rows.append(compared(QUESTION, "the rebuild of a lost mirror", "read time", "ms", rebuilt[1], peer, rebuilt[0]))
    return rows


def _fill(rig: BenchmarkRig, name: str, restaurants: int, orders: int) -> FilledDatabase:
    rig.make_database(name)
    url = rig.database_url("owner", name)
    settings = Settings(
        _env_file=None,
        database_url=url,
        database_writer_url=rig.database_url("writer", name),
        database_api_url=rig.database_url("api", name),
        database_ops_url=rig.database_url("ops", name),
    )
    run_async(migrate(settings))
    superuser = f"{rig.postgres.superuser_url.rpartition('/')[0]}/{name}"
    past = run_async(fill(superuser, History(name, restaurants, orders, datetime.now(UTC))))
    execute(superuser, "checkpoint")
    return run_async(_filled(superuser, name, past))


async def _filled(superuser: str, name: str, restaurants: list[PastRestaurant]) -> FilledDatabase:
    tokens = Tokens(SECRET, ttl_seconds=24 * 3600)
    found = FilledDatabase(name, restaurants, [], [], [])
    connection = await asyncpg.connect(superuser)
    try:
        for restaurant in restaurants:
            # Only admins may read the audit.
            found.tokens.append(
                tokens.issue(Identity(restaurant.user_id, Role.ADMIN, restaurant.id, "bench@example.org"))
            )
            oldest = await connection.fetch(
                "select id::text, created_at from orders where restaurant_id = $1 and deleted_at is null"
                " and status = 'completed' order by created_at, id limit $2",
                restaurant.id,
                _OLD_ORDERS,
            )
            last = oldest[_ORDERS_AFTER_CURSOR]
            found.cursors.append(cursor_after(last["created_at"], last["id"]))
            found.old_order_ids.append([row["id"] for row in oldest])
    finally:
        await connection.close()
    return found


async def _measure(filled: Sequence[FilledDatabase], plan: BenchmarkPlan) -> dict[str, list[list[list[float]]]]:
    """Returns the slices of latencies in milliseconds for each case and database."""
    found: dict[str, list[list[list[float]]]] = {case.name: [[] for _ in filled] for case in CASES}
    request_count = 60 if plan.quick else _REQUESTS_PER_SLICE
    next_request = dict.fromkeys(((one.name, case.name) for one in filled for case in CASES), 0)

    async def ask(one: FilledDatabase, case: ReadCase, count: int) -> list[float]:
        begin = next_request[one.name, case.name]
        next_request[one.name, case.name] += count
        return await _closed_loop(one, case, range(begin, begin + count))

    for case in CASES:
        for one in filled:
            await ask(one, case, len(one.restaurants))  # loads menus, prepares statements and plans
    for number in range(plan.rounds):
        for case in CASES:
            for place in (0, 1) if number % 2 else (1, 0):
                found[case.name][place].append(await ask(filled[place], case, request_count))
    return found


async def _closed_loop(filled: FilledDatabase, case: ReadCase, numbers: range) -> list[float]:
    """Sends the requests and returns their latencies in milliseconds.

    Raises RuntimeError if a reply is not 200 or comes from the wrong store.
    """
    address = urlsplit(filled.running.url if filled.running else "")
    waiting = iter(numbers)
    took_ms: list[float] = []

    async def client() -> None:
        reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=1 << 22)
        for number in waiting:
            path, token = case.path(filled, number), filled.tokens[number % len(filled.tokens)]
            request = f"GET {path} HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
            began = time.perf_counter()
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = _CONTENT_LENGTH.search(head)
            body = await reader.readexactly(int(length[1]) if length else 0)
            took_ms.append((time.perf_counter() - began) * 1000)
            if not head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(f"{path}: {head!r} {body[:500]!r}")
            if case.once and b"x-served-by: postgres" not in head.lower():
                raise RuntimeError(f"{path}: not read from PostgreSQL: {head!r}")
        writer.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(_CONNECTIONS):
            group.create_task(client())
    return took_ms


async def _rebuild(rig: BenchmarkRig, name: str, rounds: int) -> list[float]:
    """Returns how many milliseconds a rebuild of the mirror reads the live window and held stock, for each round."""
    connection: Any = await asyncpg.connect(rig.database_url("writer", name))
    took_ms = []
    try:
        for _ in range(rounds):
            began = time.perf_counter()
            async for _ in states.live_window(connection, order.ENTITY, datetime.now(UTC) - _LIVE_WINDOW):
                pass
            async for _ in states.holds(connection):
                pass
            took_ms.append((time.perf_counter() - began) * 1000)
    finally:
        await connection.close()
    return took_ms
