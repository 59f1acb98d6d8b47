"""PostgreSQL is restored under load from a backup that lacks the last minute. The ledger brings the missing
changes back from the log. Readers see no version go down for longer than a moment."""

import asyncio
from collections import Counter

import httpx
import pytest

from deploy.local.database import run_sql
from tests.chaos.load import Load
from tests.rigs.outage import Outage, under_load, wait_acknowledged, wait_and_prove
from tests.rigs.proxy import Mode
from tests.rigs.system import eventually

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]  # its load goes on while a database is restored

_REPEAT_SECONDS = 0.2
_LOWER_REPLIES = 25


async def without_services(outage: Outage, *statements: str) -> None:
    """Runs SQL while no service is connected. The services see PostgreSQL as unavailable for a moment."""
    outage.proxies["postgres"].set(Mode.REFUSE)
    try:

        def work() -> None:
            name = outage.system.name
            run_sql(
                outage.servers.postgres.superuser_url,
                f"select pg_terminate_backend(pid, 5000) from pg_stat_activity where datname = '{name}'",
                *statements,
            )

        await asyncio.to_thread(work)
    finally:
        outage.proxies["postgres"].set(Mode.FORWARD)


async def take_backup(outage: Outage) -> None:
    name = outage.system.name
    await without_services(outage, f'create database "{name}_backup" owner ticketrail_owner template "{name}"')


async def restore_backup(outage: Outage) -> None:
    name = outage.system.name
    await without_services(
        outage, f'drop database "{name}" with (force)', f'alter database "{name}_backup" rename to "{name}"'
    )


async def count_missing(outage: Outage, load: Load) -> int:
    """Returns how many acknowledged creations PostgreSQL does not have."""
    marks = [one.mark for one in load.acknowledged if one.kind == "created"]
    async with outage.system.database() as connection:
        found = await connection.fetch("select distinct data->'after'->>'notes' from changes where version = 1")
    return len(set(marks) - {row[0] for row in found})


class VersionWatcher:
    """Reads orders repeatedly and remembers versions that went down."""

    def __init__(self, outage: Outage, load: Load) -> None:
        self._outage, self._load = outage, load
        self._highest: Counter[str] = Counter()
        self.down: list[str] = []
        self.reads = 0
        self._suspicions: dict[tuple[httpx.AsyncClient, str], asyncio.Task[None]] = {}
        self._stopping = False
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        system = self._outage.system
        async with system.client("admin") as first, system.client("admin", service="second-orders") as second:
            while not self._stopping:
                mine = [one.order for one in self._load.acknowledged if one.restaurant == system.restaurant_id]
                for order in dict.fromkeys(mine[-60:]):
                    for client in (first, second):
                        went_down = await self._went_down(client, order)
                        if went_down and (client, order) not in self._suspicions:
                            self._suspicions[client, order] = asyncio.create_task(
                                self._confirm(client, order, went_down)
                            )
                await asyncio.sleep(0.05)
            await asyncio.gather(*self._suspicions.values())

    async def _confirm(self, client: httpx.AsyncClient, order: str, went_down: str) -> None:
        """Records a lower version only if replies of five seconds show it: while the mirror does not answer in time,
        and for a pause after that, PostgreSQL answers instead, and it is behind until the ledger has caught up."""
        lower = 0
        while lower < _LOWER_REPLIES and not self._stopping:
            await asyncio.sleep(_REPEAT_SECONDS)
            seen = await self._went_down(client, order)
            if seen == "":
                break
            if seen is not None:  # no reply says nothing about the version
                lower, went_down = lower + 1, seen
        if lower == _LOWER_REPLIES:
            self.down.append(went_down)
        else:
            del self._suspicions[client, order]

    async def _went_down(self, client: httpx.AsyncClient, order: str) -> str | None:
        """Describes the lower version. Returns "" if the version did not go down, and None if no reply came."""
        try:
            reply = await client.get(f"/api/orders/{order}")
        except httpx.HTTPError:
            return None
        if reply.status_code == 404:
            return f"{order}: gone"
        if reply.status_code != 200:
            return None
        self.reads += 1
        version, highest = reply.json()["data"]["version"], self._highest[order]
        self._highest[order] = max(version, highest)
        return f"{order}: {version} after {highest}" if version < highest else ""

    async def stop(self) -> None:
        self._stopping = True
        await self._task


async def test_a_restored_database_gets_its_missing_changes_from_the_log_under_load(outage: Outage) -> None:
    async with under_load(outage, 6) as load:
        watcher = VersionWatcher(outage, load)
        await wait_acknowledged(load, 40)
        await take_backup(outage)
        await wait_acknowledged(load, 60)
        await eventually(
            lambda: count_missing(outage, load), what="most creations in PostgreSQL", within=30, until=lambda n: n < 20
        )
        await restore_backup(outage)
        await wait_acknowledged(load, 20)
        assert await count_missing(outage, load) >= 10

        await eventually(
            lambda: count_missing(outage, load),
            what="the lost creations in PostgreSQL",
            within=150,
            until=lambda n: n < 5,
        )
        await wait_acknowledged(load, 20)
        await watcher.stop()
    await wait_and_prove(outage, load)
    assert watcher.reads > 100
    assert not watcher.down, watcher.down[:5]
