"""The cleanup: it removes expired rows and files and keeps all others."""

import asyncio
import os
import time
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from services.sync.command_session import CommandSession
from services.sync.maintenance.cleanup import Cleanup
from shared.entities import order as orders
from shared.entities.contract import encode, now
from shared.postgres.pool import Postgres
from tests.rigs import builders
from tests.rigs.command_line import ticketrail
from tests.rigs.link import link_to
from tests.rigs.restaurant import RestaurantRig, expect, register_restaurant
from tests.rigs.system import System, eventually, settings_of
from tests.rigs.turns import whole_turn

_TOKEN = (
    "insert into refresh_tokens (token_sha256, family, user_id, expires_at, revoked_at, used_at)"
    " values ($1, gen_random_uuid(), $2, now() + $3, now() + $4, now() + $4)"
)
_TOKENS = "select token_sha256 from refresh_tokens where user_id = $1"
_IMPORT = (
    "insert into imports (source_sha256, source, restaurant_id, updated_at, finished_at) values ($1, 'x', $2, $3, $4)"
)
DAY = timedelta(days=1)


@pytest.fixture
async def restaurant(system: System) -> RestaurantRig:
    return await register_restaurant(system)


async def add_tokens(restaurant: RestaurantRig) -> tuple[set[bytes], set[bytes]]:
    """Adds refresh tokens; returns the ones that the cleanup must remove and the ones that it must keep."""
    cases: list[tuple[timedelta, timedelta | None, bool]] = [
        (-8 * DAY, None, True),
        (30 * DAY, -8 * DAY, True),
        (-6 * DAY, None, False),  # a token that expired six days ago is kept, so that its reuse is noticed
        (30 * DAY, -6 * DAY, False),
        (30 * DAY, None, False),
    ]
    removed: set[bytes] = set()
    kept: set[bytes] = set()
    async with restaurant.system.database("ticketrail_owner") as connection:
        for expires, revoked, expired in cases:
            token = uuid4().bytes
            await connection.execute(_TOKEN, token, restaurant.admin_id, expires, revoked)
            (removed if expired else kept).add(token)
    return removed, kept


async def tokens(restaurant: RestaurantRig) -> set[bytes]:
    async with restaurant.system.database("ticketrail_owner") as connection:
        return {row[0] for row in await connection.fetch(_TOKENS, restaurant.admin_id)}


async def test_expired_data_is_removed_and_counted_per_kind(restaurant: RestaurantRig) -> None:
    removed, kept = await add_tokens(restaurant)
    before = await tokens(restaurant)
    async with restaurant.system.database() as connection:
        for name, updated, finished in (("old", 31, 31), ("given-up", 31, None), ("new", 29, 29)):
            at = now() - updated * DAY
            await connection.execute(
                _IMPORT, f"{restaurant.id}{name}", restaurant.id, at, None if finished is None else at
            )
            await connection.execute("insert into import_refusals values ($1, 1, 'why')", f"{restaurant.id}{name}")
    folder = settings_of(restaurant.system).traces_path
    old, new = await asyncio.to_thread(_trace_files, folder)
    claimed = await _leave_a_claim(restaurant)

    ended = await ticketrail(restaurant.system, "cleanup", "--json")
    assert ended.code == 0, ended.err
    counts = ended.printed
    assert counts.keys() == {
        "tokens",
        "identity_events",
        "revocations",
        "imports",
        "heartbeats",
        "dead_letters",
        "replays",
        "trace_files",
        "claims",
    }
    assert (counts["tokens"] >= 2, counts["imports"] >= 2, counts["trace_files"] >= 1) == (True, True, True)
    assert await tokens(restaurant) == before - removed
    assert kept < before
    async with restaurant.system.database() as connection:
        left = await connection.fetch("select source_sha256 from imports where restaurant_id = $1", restaurant.id)
        reasons = await connection.fetchval(
            "select count(*) from import_refusals where source_sha256 like $1", f"{restaurant.id}%"
        )
    assert ([row[0] for row in left], reasons) == ([f"{restaurant.id}new"], 1)
    assert (await asyncio.to_thread(old.exists), await asyncio.to_thread(new.exists)) == (False, True)
    # The cleanup or the faster reconciler has finished the stale claim, so the order exists.
    async with restaurant.client() as staff:
        await eventually(lambda: _status(staff, claimed), what="the claimed order", until=lambda status: status == 200)
        assert expect(await staff.get(f"/api/orders/{claimed}"))["version"] == 1


async def _status(client: httpx.AsyncClient, id_: str) -> int:
    return (await client.get(f"/api/orders/{id_}")).status_code


def _trace_files(folder: Path) -> tuple[Path, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    old, new = folder / f"gone-{uuid4().hex}.jsonl", folder / f"here-{uuid4().hex}.jsonl"
    for path, days in ((old, 8), (new, 6)):
        path.touch()
        at = time.time() - days * 86_400
        os.utime(path, (at, at))
    return old, new


async def _leave_a_claim(restaurant: RestaurantRig) -> str:
    """Leaves a stale claim, like an owner that died before it recorded the order; returns the id of the order."""
    order = builders.order(restaurant_id=restaurant.id, created_at=now(), updated_at=now())
    change = builders.change(order)
    async with CommandSession(settings_of(restaurant.system, claim_stale_seconds=0.001)) as session:
        await session.mirror.claim(orders.ENTITY, change, encode(change), None, None)
        await asyncio.sleep(2.1)  # a claim is stale after the time that the system's settings name
    return order.id


async def test_cleanup_runs_by_itself_and_waits_while_postgres_is_unavailable(restaurant: RestaurantRig) -> None:
    async with link_to(restaurant.system.database_url("ticketrail_writer")) as database:
        settings = settings_of(restaurant.system, cleanup_interval_seconds=0.05, database_timeout_seconds=1.0)
        postgres = Postgres(database.url, settings)
        cleanup = Cleanup(settings, postgres)
        await database.cut()
        cleanup.start()
        try:
            expired, _ = await add_tokens(restaurant)
            await whole_turn(cleanup.loop)
            assert expired <= await tokens(restaurant)
            await database.restore()

            async def left() -> set[bytes]:
                return expired & await tokens(restaurant)

            await eventually(left, what="the removal of the tokens", until=lambda found: not found)
        finally:
            await cleanup.stop()
            await postgres.close()
