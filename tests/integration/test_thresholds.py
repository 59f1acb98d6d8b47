"""Thresholds of pending and failed changes: log, metrics and status of each restaurant show when one is exceeded and
when it no longer is."""

import asyncio
import math
from collections.abc import AsyncIterator
from functools import partial

import pytest
from structlog.testing import capture_logs

from services.sync.mirror.sync_status import sync_status
from services.sync.mirror.thresholds import Thresholds
from shared.entities.contract import Change, encode, now
from shared.mirror.stored_heads import FailedState, StoredHead
from shared.postgres.pool import Postgres
from tests.rigs.builders import OTHER_RESTAURANT, RESTAURANT, change, order
from tests.rigs.postgres_writer import MakeRig, Rig
from tests.rigs.rail.changes import applied
from tests.rigs.servers import Servers

FAILURE = encode({"error": "boom", "attempts": 1, "last_attempt": now()})


@pytest.fixture
async def rig(make_rig: MakeRig, servers: Servers) -> AsyncIterator[Rig]:
    """A rig with its own Redis, because the check counts all restaurants in it."""
    own = await asyncio.to_thread(servers.extra_redis)
    try:
        yield await make_rig(redis_url=own.url)
    finally:
        await asyncio.to_thread(own.discard)


async def reveal(rig: Rig, count: int, restaurant: str = RESTAURANT) -> list[Change]:
    made = [change(order(restaurant_id=restaurant)) for _ in range(count)]
    await rig.mirror.apply([applied(one) for one in made])
    for id_ in {RESTAURANT, OTHER_RESTAURANT}:
        await rig.mirror.keep_restaurant(id_, b"{}")
    return made


async def fail(rig: Rig, changes: list[Change]) -> None:
    await rig.mirror.note_failures(
        [FailedState(RESTAURANT, "order", one.entity_id, one.id, FAILURE) for one in changes]
    )


async def settle(rig: Rig, changes: list[Change]) -> None:
    await rig.mirror.settle([StoredHead(RESTAURANT, "order", one.entity_id, one.head) for one in changes])


async def test_exceeded_threshold_is_logged_once_per_restaurant_and_again_when_it_ends(rig: Rig) -> None:
    watched = Thresholds(
        rig.settings.model_copy(update={"pending_warning_changes": 2, "failed_warning_changes": 1}), rig.mirror
    )
    assert math.isnan(watched.pending), "a count is shown before the first check"
    mine = await reveal(rig, 3)
    await reveal(rig, 2, OTHER_RESTAURANT)
    await fail(rig, mine[:2])
    with capture_logs() as logs:
        await watched.count()
        await watched.count()
    logged = [(one["event"], one["restaurant_id"], one["state"], one["count"], one["threshold"]) for one in logs]
    assert logged == [
        ("sync_above_threshold", RESTAURANT, "failed", 2, 1),
        ("sync_above_threshold", RESTAURANT, "pending", 3, 2),
    ]
    assert {one["log_level"] for one in logs} == {"warning"}
    assert (watched.pending, watched.failed, watched.over) == (5, 2, {"pending": 1.0, "failed": 1.0})

    await settle(rig, mine[:2])
    with capture_logs() as logs:
        await watched.count()
    assert [(one["event"], one["state"]) for one in logs] == [
        ("sync_below_threshold", "failed"),
        ("sync_below_threshold", "pending"),
    ]
    assert (watched.pending, watched.failed, watched.over) == (3, 0, {"pending": 0.0, "failed": 0.0})


async def test_status_flags_and_lists_exceeded_thresholds(rig: Rig) -> None:
    settings = rig.settings.model_copy(update={"pending_warning_changes": 1, "failed_warning_changes": 1})
    api = Postgres(settings.database_api_url, settings)
    tenant = partial(api.tenant, RESTAURANT)
    try:
        status = await sync_status(settings, tenant, rig.mirror, RESTAURANT)
        assert (status.summary, status.above_threshold, status.warnings) == ("synced", False, [])
        made = await reveal(rig, 2)
        await fail(rig, made[:1])
        status = await sync_status(settings, tenant, rig.mirror, RESTAURANT)
        assert (status.summary, status.above_threshold) == ("failed", True)
        assert [(one.state, one.count, one.threshold) for one in status.warnings] == [("pending", 2, 1)]
        assert (status.totals.pending, status.tables["order"].failed) == (2, 1)
        other = partial(api.tenant, OTHER_RESTAURANT)
        assert (await sync_status(settings, other, rig.mirror, OTHER_RESTAURANT)).summary == "synced"
    finally:
        await api.close()
