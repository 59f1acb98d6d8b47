"""`ticketrail full-sync` on a running system: it finds where the mirror differs from PostgreSQL and repairs the
mirror."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from uuid import uuid4

import msgspec
import pytest
import redis.asyncio
from msgspec import structs

from services.sync.command_session import CommandSession
from services.sync.heartbeat import log_path_of
from services.sync.mirror.full_sync import Compared, Difference, FullSync
from shared.entities import order as orders
from shared.entities.contract import Head, Lane, encode, now
from shared.mirror import keys
from shared.mirror.mirror import Apply
from shared.mirror.stored_heads import StoredHead
from tests.rigs import builders
from tests.rigs.command_line import ticketrail
from tests.rigs.restaurant import RestaurantRig, expect, made, register_restaurant
from tests.rigs.system import System, eventually, settings_of


@pytest.fixture
async def restaurant(system: System) -> RestaurantRig:
    return await register_restaurant(system)


@pytest.fixture
async def raw(system: System) -> AsyncIterator[Any]:
    async with redis.asyncio.from_url(system.redis.url) as client:
        yield client


async def place(restaurant: RestaurantRig, count: int = 1) -> list[str]:
    """Places orders, waits until they are synced and returns their ids."""
    dish = (await restaurant.dish())["id"]
    async with restaurant.client() as staff:
        ids = [
            made(await staff.post("/api/orders", json={"items": [{"menu_item_id": dish, "quantity": 1}]}))["id"]
            for _ in range(count)
        ]
        for id_ in ids:
            await synced(restaurant, id_)
    return ids


async def synced(restaurant: RestaurantRig, id_: str) -> None:
    async def look() -> str:
        async with restaurant.client() as staff:
            return str(expect(await staff.get(f"/api/orders/{id_}"))["sync"]["state"])

    await eventually(look, what="the state `synced`", until=lambda found: found == "synced")


async def read_from_the_log(restaurant: RestaurantRig) -> None:
    """Waits until the mirror writer has read every change recorded so far. Otherwise it would restore keys that the
    test removes later."""
    began, path = time.monotonic(), log_path_of(Lane.CRITICAL)

    async def sent() -> float:
        asked = time.monotonic()
        heartbeats = (await asyncio.to_thread(restaurant.system.health, "worker"))["heartbeats"]
        return asked - float(heartbeats["age_seconds"][path]) - float(heartbeats["lag_seconds"][path])

    await eventually(sent, what="a later heartbeat from the log", until=lambda at: at > began)


async def compare(restaurant: RestaurantRig, *, repair: bool, **options: Any) -> tuple[Compared, dict[str, str]]:
    """Returns the result, and {id: kind of difference} of this restaurant only, since other tests use the system."""
    differences: list[Difference] = []
    async with CommandSession(settings_of(restaurant.system)) as session:
        comparing = FullSync(session.settings, session.postgres, session.mirror, **options)
        found = await comparing.run(repair=repair, report=differences.append)
    return found, {one.id: one.what for one in differences if one.restaurant_id == restaurant.id}


def doc(restaurant: RestaurantRig, id_: str, entity: str = "order") -> str:
    return keys.doc(restaurant.id, entity, id_)


async def served(restaurant: RestaurantRig, id_: str) -> dict[str, Any]:
    async with restaurant.client() as staff:
        reply = await staff.get(f"/api/orders/{id_}")
    return {"by": reply.headers["x-served-by"], **expect(reply)}


async def test_mirror_that_lost_its_keys_is_rebuilt(restaurant: RestaurantRig, raw: Any) -> None:
    ids = await place(restaurant, 3)
    dish = (await restaurant.dish(name="Gone from the mirror"))["id"]

    async def stored() -> bool:
        async with restaurant.system.database() as connection:
            return bool(await connection.fetchval("select count(*) from menu_items where id = $1", dish))

    await eventually(stored, what="the dish in PostgreSQL")
    before = [await served(restaurant, id_) for id_ in ids]
    found, differing = await compare(restaurant, repair=False)
    assert differing == {}, "the mirror is incomplete before the test"
    assert found.compared > 3
    # The worker is frozen, because it may still read the creations from the log.
    async with restaurant.system.frozen("worker"):
        await raw.delete(
            *(doc(restaurant, id_) for id_ in ids[:2]),
            doc(restaurant, dish, "menu_item"),
            keys.restaurant(restaurant.id),
        )
        verified = await ticketrail(restaurant.system, "full-sync", "--verify")
        assert verified.code == 1
        lines = [line.split() for line in verified.out.splitlines() if restaurant.id in line]
        assert sorted(line[:3] for line in lines) == sorted(
            [["missing", "menu_item", dish], *(["missing", "order", id_] for id_ in ids[:2])]
        )
        assert ", 0 repaired" in verified.out
        assert await raw.exists(doc(restaurant, ids[0])) == 0, "--verify changed the mirror"

        repaired = await ticketrail(restaurant.system, "full-sync", "--json")
        assert repaired.code == 0
        differences = [one for one in repaired.printed["differences"] if one["restaurant_id"] == restaurant.id]
        assert {one["id"]: one["what"] for one in differences} == dict.fromkeys([*ids[:2], dish], "missing")
    assert repaired.printed["repaired"] >= 3
    assert [await served(restaurant, id_) for id_ in ids] == before
    assert {one["by"] for one in before} == {"mirror"}
    assert await raw.exists(keys.restaurant(restaurant.id)) == 1
    assert (await compare(restaurant, repair=False))[1] == {}


async def test_old_different_and_unknown_states_are_reported_by_kind_and_repaired(
    restaurant: RestaurantRig, raw: Any
) -> None:
    behind, differs, pending_too = await place(restaurant, 3)
    old = await raw.hgetall(doc(restaurant, behind))
    async with restaurant.client() as staff:
        expect(await staff.put(f"/api/orders/{behind}", json={"notes": "new"}))
    await synced(restaurant, behind)
    # The worker is frozen, because it may still read the change from the log.
    async with restaurant.system.frozen("worker"):
        await raw.delete(doc(restaurant, behind))
        await raw.hset(doc(restaurant, behind), mapping=old)
        for id_ in (differs, pending_too):
            state = json.loads(await raw.hget(doc(restaurant, id_), "d"))
            await raw.hset(doc(restaurant, id_), "d", json.dumps({**state, "total": 1}))
        # The mirror marks the order as pending by mistake: PostgreSQL has this very change.
        await raw.zadd(keys.pending(restaurant.id, "order"), {pending_too: 1.0})
        unknown = builders.order(restaurant_id=restaurant.id, created_at=now(), updated_at=now())
        await put(restaurant, unknown, "stored")

        expected = {behind: "behind", differs: "differs", pending_too: "differs", unknown.id: "unknown"}
        assert (await compare(restaurant, repair=False))[1] == expected
        found, differing = await compare(restaurant, repair=True)
        assert differing == expected
    assert found.repaired >= 4
    assert (await compare(restaurant, repair=False))[1] == {}
    assert (await served(restaurant, behind))["notes"] == "new"
    assert [(await served(restaurant, id_))["total"] for id_ in (differs, pending_too)] == [1050, 1050]
    assert await raw.exists(doc(restaurant, unknown.id)) == 0


async def put(restaurant: RestaurantRig, state: orders.Order, how: str, version: int = 1, *, at: Any = None) -> Head:
    """Writes a state to the mirror only; returns its head."""
    head = Head(version, str(uuid4()))
    async with CommandSession(settings_of(restaurant.system)) as session:
        await session.mirror.apply([Apply(orders.ENTITY, state, head, encode(state), at or now(), how)])
    return head


async def test_pending_states_are_left_alone(restaurant: RestaurantRig, raw: Any) -> None:
    """One order is new and one is ahead of PostgreSQL; both are pending."""
    (known,) = await place(restaurant)
    state = msgspec.json.decode(await raw.hget(doc(restaurant, known), "d"), type=orders.Order)
    ahead = structs.replace(state, notes="ahead")
    new = builders.order(restaurant_id=restaurant.id, created_at=now(), updated_at=now())
    heads = [await put(restaurant, ahead, "reveal", 2), await put(restaurant, new, "reveal")]
    found, differing = await compare(restaurant, repair=True)
    assert differing == {}
    assert found.pending >= 2
    async with CommandSession(settings_of(restaurant.system)) as session:
        _, documents = await session.mirror.read(restaurant.id, "order", [known, new.id])
        assert [one and (one.head, one.pending) for one in documents] == [(one, True) for one in heads]
        # Later tests must not find these pending states.
        for id_, head in zip([known, new.id], heads, strict=True):
            await session.mirror.settle([StoredHead(restaurant.id, "order", id_, head)])
            await session.mirror.trim(restaurant.id, "order", {id_: head.change_id})


async def test_changes_in_progress_are_not_treated_as_differences(restaurant: RestaurantRig, raw: Any) -> None:
    """A change may be in PostgreSQL a moment before its reveal, and new orders arrive during the comparison."""
    (known,) = await place(restaurant)
    await read_from_the_log(restaurant)
    current = await raw.hgetall(doc(restaurant, known))
    await raw.delete(doc(restaurant, known))

    dish = (await restaurant.dish())["id"]
    stop = asyncio.Event()
    placed: list[str] = []
    under_way = asyncio.Lock()
    pauses: list[float] = []

    async def pause(seconds: float) -> None:
        """Runs before the second comparison. By then every change in progress is revealed."""
        pauses.append(seconds)
        await raw.hset(doc(restaurant, known), mapping=current)
        async with under_way:
            pass

    patient: dict[str, Any] = {"in_flight": timedelta(minutes=5), "sleep": pause}  # longer than this test takes

    async def place_orders() -> None:
        async with restaurant.client() as staff:
            while not stop.is_set():
                body = {"items": [{"menu_item_id": dish, "quantity": 1}]}
                async with under_way:
                    placed.append(made(await staff.post("/api/orders", json=body))["id"])
                    expect(await staff.put(f"/api/orders/{placed[-1]}", json={"notes": "x"}))
                await asyncio.sleep(0.02)

    placing = asyncio.create_task(place_orders())
    try:
        assert (await compare(restaurant, repair=False, **patient))[1] == {}
        assert 300.0 in pauses, "the unrevealed change was not compared a second time"
        assert (await compare(restaurant, repair=True, **patient))[1] == {}
    finally:
        stop.set()
        await placing
    for id_ in placed:
        assert (await served(restaurant, id_))["version"] == 2
