"""Are a restaurant's reads as fast among a million orders as among ten thousand?

Two databases on one server, 200 restaurants in each, filled by COPY as the writer would have left them (history.py): 50
orders a restaurant, and 5,000, over the same 400 days. An orders service on each; both ask the same mirror. Closed
loop, 4 connections, the two in turn; every request is another restaurant's than the one before, and every order that is
read by its id another one, too old for the mirror. Lists are pages of 20, so that both sides answer as many rows.
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
from services.orders.lists import cursor_after
from shared.entities import order
from shared.postgres import states
from shared.postgres.migrate import migrate
from shared.security.tokens import Identity, Role, Tokens
from shared.settings import Settings

QUESTION = "large"
_CONNECTIONS = 4
_REQUESTS = 1_000
"""In a slice: its p99 is that of the tenth from the end."""
_PAGE = 20
_DEEP = 25
"""The page before the last: so many orders are left behind its cursor."""
_LENGTH = re.compile(rb"(?i)content-length: (\d+)")
_ALLOWED = 2.0

Paths = Callable[["FilledDatabase", int], str]


class ReadCase(Struct, frozen=True):
    name: str
    path: Paths
    """Of a database and the number of a request."""
    judged: bool = True
    once: bool = False
    """Each path is asked for once: then it is in the mirror."""


class FilledDatabase(Struct):
    name: str
    shops: list[PastRestaurant]
    tokens: list[str]
    cursors: list[str]
    old: list[list[str]]
    """Of each restaurant, ids of orders that no mirror has."""
    running: RunningProgram | None = None

    def shop(self, number: int) -> PastRestaurant:
        return self.shops[number % len(self.shops)]

    def cursor(self, number: int) -> str:
        return self.cursors[number % len(self.cursors)]


def _orders(more: Callable[[FilledDatabase, int], str]) -> Paths:
    return lambda filled, number: f"/api/orders?limit={_PAGE}{more(filled, number)}"


def _old_order(filled: FilledDatabase, number: int) -> str:
    of_shop = filled.old[number % len(filled.shops)]
    return f"/api/orders/{of_shop[number // len(filled.shops) % len(of_shop)]}"


def _summary(_: FilledDatabase, number: int) -> str:
    return "/api/orders/summary"


def _long_summary(_: FilledDatabase, number: int) -> str:
    today = datetime.now(UTC).date()
    return f"/api/orders/summary?from={today - timedelta(days=DAYS - 1)}&to={today}"


CASES = (
    ReadCase("orders, first page", _orders(lambda *_: "")),
    ReadCase("orders, page before the last", _orders(lambda filled, number: f"&cursor={filled.cursor(number)}")),
    ReadCase("orders by status", _orders(lambda *_: "&status=completed")),
    ReadCase("orders at a table", _orders(lambda filled, number: f"&table_id={filled.shop(number).table_ids[0]}")),
    ReadCase("an old order", _old_order, once=True),
    ReadCase("summary of 30 days", _summary),
    ReadCase("summary of 400 days", _long_summary),
    ReadCase("payments", lambda *_: f"/api/payments?limit={_PAGE}"),
    ReadCase("audit", lambda *_: f"/api/audit?limit={_PAGE}"),
    ReadCase("customers with their totals", lambda *_: f"/api/customers?limit={_PAGE}", judged=False),
)  # fmt: skip


def run(rig: BenchmarkRig, plan: BenchmarkPlan) -> list[ResultRow]:
    restaurants, few, many = (20, 2_000, 10_000) if plan.quick else (200, 10_000, 1_000_000)
    filled = [_fill(rig, f"large_{orders}", restaurants, orders) for orders in (few, many)]
    try:
        rig.rest(60.0)
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
            judged = _ALLOWED if case.judged and metric == "p99" else None
            rows.append(compared(QUESTION, case.name, metric, "ms", large, peer, small, at_most=judged))
    rows.append(compared(QUESTION, "what a lost mirror is filled with", "read in", "ms", rebuilt[1], peer, rebuilt[0]))
    return rows


def _fill(rig: BenchmarkRig, name: str, restaurants: int, orders: int) -> FilledDatabase:
    rig.make_database(name)
    url = rig.database_url("owner", name)
    settings = Settings(  # type: ignore[call-arg]
        _env_file=None,
        database_url=url,
        database_writer_url=rig.database_url("writer", name),
        database_api_url=rig.database_url("api", name),
        database_ops_url=rig.database_url("ops", name),
    )
    run_async(migrate(settings))
    superuser = f"{rig.postgres.superuser_url.rpartition('/')[0]}/{name}"
    shops = run_async(fill(superuser, History(name, restaurants, orders, datetime.now(UTC))))
    execute(superuser, "checkpoint")
    return run_async(_filled(superuser, name, shops))


async def _filled(superuser: str, name: str, shops: list[PastRestaurant]) -> FilledDatabase:
    tokens = Tokens(SECRET, ttl_seconds=24 * 3600)
    found = FilledDatabase(name, shops, [], [], [])
    connection = await asyncpg.connect(superuser)
    try:
        for shop in shops:
            # The audit is for admins.
            found.tokens.append(tokens.issue(Identity(shop.user_id, Role.ADMIN, shop.id, "bench@example.org")))
            oldest = await connection.fetch(
                "select id::text, created_at from orders where restaurant_id = $1 and deleted_at is null"
                " and status = 'completed' order by created_at, id limit 80",
                shop.id,
            )
            found.cursors.append(cursor_after(oldest[_DEEP]["created_at"], oldest[_DEEP]["id"]))
            found.old.append([row["id"] for row in oldest])
    finally:
        await connection.close()
    return found


async def _measure(filled: Sequence[FilledDatabase], plan: BenchmarkPlan) -> dict[str, list[list[list[float]]]]:
    """ReadCase -> for each database its slices of latencies in ms."""
    found: dict[str, list[list[list[float]]]] = {case.name: [[] for _ in filled] for case in CASES}
    asked = 60 if plan.quick else _REQUESTS
    next_one = dict.fromkeys(((one.name, case.name) for one in filled for case in CASES), 0)

    async def ask(one: FilledDatabase, case: ReadCase, count: int) -> list[float]:
        begin = next_one[one.name, case.name]
        next_one[one.name, case.name] += count
        return await _closed_loop(one, case, range(begin, begin + count))

    for case in CASES:
        for one in filled:
            await ask(one, case, len(one.shops))  # menus, statements, plans
    for number in range(plan.rounds):
        for case in CASES:
            for place in (0, 1) if number % 2 else (1, 0):
                found[case.name][place].append(await ask(filled[place], case, asked))
    return found


async def _closed_loop(filled: FilledDatabase, case: ReadCase, numbers: range) -> list[float]:
    """Latencies in ms. Raises RuntimeError when an answer is not 200, or comes from the wrong store."""
    address = urlsplit(filled.running.url if filled.running else "")
    waiting = iter(numbers)
    took: list[float] = []

    async def client() -> None:
        reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=1 << 22)
        for number in waiting:
            path, token = case.path(filled, number), filled.tokens[number % len(filled.tokens)]
            request = f"GET {path} HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
            began = time.perf_counter()
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = _LENGTH.search(head)
            body = await reader.readexactly(int(length[1]) if length else 0)
            took.append((time.perf_counter() - began) * 1000)
            if not head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(f"{path}: {head!r} {body[:500]!r}")
            if case.once and b"x-served-by: postgres" not in head.lower():
                raise RuntimeError(f"{path}: not read from PostgreSQL: {head!r}")
        writer.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(_CONNECTIONS):
            group.create_task(client())
    return took


async def _rebuild(rig: BenchmarkRig, name: str, rounds: int) -> list[float]:
    """The reading part of it alone: orders of the live window, and what orders hold of the stock."""
    connection: Any = await asyncpg.connect(rig.database_url("writer", name))
    took = []
    try:
        for _ in range(rounds):
            began = time.perf_counter()
            async for _ in states.live_window(connection, order.ENTITY, datetime.now(UTC) - timedelta(days=3)):
                pass
            async for _ in states.holds(connection):
                pass
            took.append((time.perf_counter() - began) * 1000)
    finally:
        await connection.close()
    return took
