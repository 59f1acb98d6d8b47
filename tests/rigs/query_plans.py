"""A database with the history of many restaurants. Its server reports the plan of each statement (auto_explain)."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import islice
from typing import Any
from uuid import uuid4

import asyncpg
from msgspec import Struct

from benchmarks.history import History, PastRestaurant, fill
from deploy.local.port_check import find_free
from shared.mirror.mirror import Mirror
from shared.postgres.migrate import migrate
from shared.postgres.pool import Postgres
from shared.settings import Settings
from tests.rigs.servers import Servers

BIG = ("orders", "order_items", "order_holds", "payments", "changes")
EXPLAIN = {
    "session_preload_libraries": "auto_explain",
    "auto_explain.log_min_duration": "0",
    "auto_explain.log_analyze": "on",
    "auto_explain.log_buffers": "on",
    "auto_explain.log_timing": "off",
    "auto_explain.log_format": "json",
    "auto_explain.log_level": "notice",
}

MODES = {"at first": "force_custom_plan", "after ten runs": "auto", "for all values": "force_generic_plan"}


class Plan(Struct):
    text: str
    nodes: list[dict[str, Any]]

    @property
    def scans(self) -> list[dict[str, Any]]:
        return [node for node in self.nodes if node.get("Relation Name") in BIG]

    def read(self, *tables: str) -> int:
        """Returns the number of rows that were read, including those that a filter then removed."""
        return sum(
            node["Actual Loops"] * sum(node.get(name, 0) for name in _ROWS_READ)
            for node in self.scans
            if node["Relation Name"] in (tables or BIG)
        )

    @property
    def pages(self) -> int:
        return int(self.nodes[0]["Shared Hit Blocks"] + self.nodes[0]["Shared Read Blocks"])


_ROWS_READ = ("Actual Rows", "Rows Removed by Filter", "Rows Removed by Index Recheck")


def _nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for inner in node.get("Plans", ()):
        yield from _nodes(inner)


class ExplainedPostgres(Postgres):
    """A pool of one connection, so that each statement is prepared once. It keeps the plans that read the big
    tables."""

    def __init__(self, url: str, settings: Settings) -> None:
        super().__init__(url, settings, size=1)
        self.mode = "auto"
        self.plans: list[Plan] = []

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Any]:
        async with super().connection() as connection:
            connection.add_log_listener(self._note)
            await connection.execute(f"set plan_cache_mode = {self.mode}")
            try:
                yield connection
            finally:
                # The listener gets the last messages of the server in this turn of the event loop.
                await asyncio.sleep(0)
                connection.remove_log_listener(self._note)

    def _note(self, _: Any, message: Any) -> None:
        found = re.search(r"plan:\s*(\{.*)", message.message, re.DOTALL)
        if found is not None:
            explained = json.loads(found[1])
            plan = Plan(json.dumps(explained), list(_nodes(explained["Plan"])))
            if plan.scans:
                self.plans.append(plan)


class Database(Struct):
    """A database that is filled, vacuumed and analyzed."""

    history: History
    restaurant: PastRestaurant
    """One of the 25 restaurants."""
    api: ExplainedPostgres
    writer: ExplainedPostgres
    mirror: Mirror
    """A mirror whose server does not exist."""
    oldest: list[Any]
    """The first orders of the restaurant, as they were placed."""

    async def plans(self, work: Callable[[], Awaitable[Any]], mode: str) -> list[Plan]:
        """Runs `work` and returns the plans of its last run; `mode` is one of MODES."""
        for postgres in (self.api, self.writer):
            postgres.mode = MODES[mode]
        for _ in range(10 if mode == "after ten runs" else 1):
            self.api.plans, self.writer.plans = [], []
            await work()
        found = self.api.plans + self.writer.plans
        assert found, "no plan was reported"
        return found


@asynccontextmanager
async def empty_database(servers: Servers) -> AsyncIterator[tuple[str, str, Settings]]:
    """Yields (name, URL of the superuser, settings) of a migrated database."""
    name = f"plans{uuid4().hex[:8]}"
    await asyncio.to_thread(servers.postgres.make_database, name)
    settings = Settings(
        _env_file=None,
        database_url=servers.postgres.url("ticketrail_owner", name),
        database_writer_url=servers.postgres.url("ticketrail_writer", name),
        database_api_url=servers.postgres.url("ticketrail_api", name),
        database_ops_url=servers.postgres.url("ticketrail_ops", name),
        database_timeout_seconds=30.0,
    )
    try:
        await migrate(settings)
        yield name, f"{servers.postgres.superuser_url.rpartition('/')[0]}/{name}", settings
    finally:
        await asyncio.to_thread(servers.postgres.drop_database, name)


@asynccontextmanager
async def filled_database(servers: Servers, history: History) -> AsyncIterator[Database]:
    async with empty_database(servers) as (name, superuser_url, settings):
        superuser = await asyncpg.connect(superuser_url)
        for table in BIG:
            # Autovacuum is off while the tables fill: a page that it reads at that time would stay unmarked as
            # all-visible.
            await superuser.execute(f"alter table {table} set (autovacuum_enabled = off)")
        restaurants = await fill(superuser_url, history)
        for role in ("ticketrail_api", "ticketrail_writer"):
            for setting, value in EXPLAIN.items():
                await superuser.execute(f"alter role {role} in database {name} set {setting} = '{value}'")
        await superuser.close()
        mirror = Mirror(f"redis://127.0.0.1:{find_free(1)[0]}/0", timeout=0.5, stale_seconds=2.0)
        api = ExplainedPostgres(settings.database_api_url, settings)
        writer = ExplainedPostgres(settings.database_writer_url, settings)
        try:
            yield Database(history, restaurants[7], api, writer, mirror, _oldest(history, restaurants, 7))
        finally:
            await mirror.close()
            await api.close()
            await writer.close()


def _oldest(history: History, restaurants: list[PastRestaurant], index: int) -> list[Any]:
    written = islice(history.changes(restaurants), index, 26 * len(restaurants), len(restaurants))
    return [changes[0].state for changes in written]
