"""The reconciler records changes again whose message is lost, and does not treat late changes as lost."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import pytest

from services.sync.command_session import CommandSession
from services.sync.heartbeat import lanes_emptied
from services.sync.maintenance.lost_messages import LostMessages
from services.sync.maintenance.reconciler import Reconciler
from services.sync.writer.upsert import DecodedChange, write_batch
from shared.entities import order as orders
from shared.entities.contract import Head, Lane, encode, now
from shared.messaging.management import ask
from shared.messaging.topology import lane_queue
from shared.mirror.mirror import Apply
from shared.mirror.stored_heads import FailedState
from tests.rigs import builders
from tests.rigs.rail.changes import applied
from tests.rigs.restaurant import RestaurantRig, expect, made, register_restaurant
from tests.rigs.servers import Servers
from tests.rigs.system import System, eventually, settings_of

LOST_MESSAGE_SECONDS = 1.0


@pytest.fixture(scope="module")
async def patient(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[System]:
    """A system that records lost changes again after a second. It has one consumer for each lane. With two
    consumers, a heartbeat could overtake orders that the other consumer commits only after that second."""
    own_redis = await asyncio.to_thread(servers.extra_redis)
    settings = {"lost_message_seconds": LOST_MESSAGE_SECONDS, "reconcile_interval_seconds": 0.2, "lane_consumers": 1}
    system = System(servers, tmp_path_factory.mktemp("heal"), redis=own_redis, **settings)
    try:
        await system.up("orders", "worker")
        yield system
    finally:
        await system.down()
        await asyncio.to_thread(own_redis.discard)


async def place(restaurant: RestaurantRig, count: int, dish: str) -> list[str]:
    body = {"items": [{"menu_item_id": dish, "quantity": 1}]}
    async with restaurant.client() as staff:
        return [made(await staff.post("/api/orders", json=body))["id"] for _ in range(count)]


async def versions(restaurant: RestaurantRig, ids: list[str]) -> list[list[int]]:
    """Returns the versions that `changes` has of each order."""
    async with restaurant.system.database() as connection:
        rows = await connection.fetch(
            "select entity_id::text, array_agg(version order by version) from changes"
            " where entity_id = any($1::uuid[]) group by 1",
            ids,
        )
    found = {row[0]: list(row[1]) for row in rows}
    return [found.get(id_, []) for id_ in ids]


async def test_changes_of_a_purged_queue_are_recorded_again_and_waiting_ones_are_not(patient: System) -> None:
    restaurant = await register_restaurant(patient)
    dish = (await restaurant.dish())["id"]
    await eventually(lambda: stored_dish(restaurant, dish), what="the dish in PostgreSQL")
    await patient.stop("worker")

    behind = await place(restaurant, 3, dish)
    async with reconciler_of(patient) as reconciler:
        # The orders must be much older than the threshold.
        await asyncio.sleep(2 * LOST_MESSAGE_SECONDS)
        assert await reconciler.lost_messages.record_again() == 0, (
            "the orders were recorded again, although the lanes were not empty"
        )
    patient.start("worker")
    await patient.ready("worker")
    await eventually(
        lambda: versions(restaurant, behind), what="the waiting orders", until=lambda found: found == [[1]] * 3
    )

    await patient.stop("worker")
    lost = await place(restaurant, 3, dish)
    async with restaurant.client() as staff:
        paid = made(await staff.post(f"/api/orders/{lost[0]}/payments", json={"amount": 300, "method": "card"}))
    queue = f"/api/queues/{quote(patient.name)}/{lane_queue(Lane.CRITICAL)}/contents"
    await asyncio.to_thread(ask, patient.servers.rabbitmq.management_url, "DELETE", queue)
    patient.start("worker")
    await patient.ready("worker")
    await eventually(
        lambda: versions(restaurant, lost),
        within=30,
        what="the orders as new versions",
        until=lambda found: found == [[3], [2], [2]],
    )
    async with restaurant.client() as staff:
        for id_, version in zip(lost, (3, 2, 2), strict=True):

            async def seen(id_: str = id_) -> dict[str, Any]:
                found: dict[str, Any] = expect(await staff.get(f"/api/orders/{id_}"))
                return found

            found = await eventually(
                seen, what="the state `synced`", until=lambda found: found["sync"]["state"] == "synced"
            )
            assert found["version"] == version
    async with patient.database() as connection:
        rows = await connection.fetch("select source, actor, lane from changes where entity_id = any($1::uuid[])", lost)
        payments = await connection.fetch("select id::text, amount from payments where order_id = $1", lost[0])
        assert await connection.fetchval("select count(*) from conflicts where restaurant_id = $1", restaurant.id) == 0
    assert {tuple(row) for row in rows} == {("sync", "reconciler", "critical")}
    assert [tuple(row) for row in payments] == [(paid["payment"]["id"], 300)]
    # By now the reconciler has checked the late orders several times.
    assert await versions(restaurant, behind) == [[1]] * 3
    assert await versions(restaurant, lost) == [[3], [2], [2]], (
        "an order was recorded again more than once, or not at all"
    )


async def stored_dish(restaurant: RestaurantRig, dish: str) -> bool:
    async with restaurant.system.database() as connection:
        return bool(await connection.fetchval("select count(*) from menu_items where id = $1", dish))


@asynccontextmanager
async def reconciler_of(system: System, **settings: Any) -> AsyncIterator[Reconciler]:
    """A reconciler in this process, for a system whose worker is stopped or not involved."""
    async with CommandSession(settings_of(system, **settings)) as session:
        yield Reconciler(session.settings, session.postgres, session.mirror, session.rail)


async def pending(restaurant: RestaurantRig, *, count: int = 1, age: float = 120, **fields: Any) -> list[str]:
    """Writes orders that only the mirror has, accepted `age` seconds ago; returns their ids. The age is below the
    threshold of the system's own worker, which must not record them again."""
    at = now() - timedelta(seconds=age)
    states = [
        builders.order(restaurant_id=restaurant.id, **{"created_at": at, "updated_at": at, **fields})
        for _ in range(count)
    ]
    await put(restaurant, states, at, "reveal")
    return [state.id for state in states]


async def put(restaurant: RestaurantRig, states: list[orders.Order], at: datetime, how: str) -> None:
    async with CommandSession(settings_of(restaurant.system)) as session:
        for start in range(0, len(states), 100):
            await session.mirror.apply(
                [
                    Apply(orders.ENTITY, state, Head(1, str(uuid4())), encode(state), at, how)
                    for state in states[start : start + 100]
                ]
            )


async def test_journals_get_time_to_drain_after_an_outage(system: System) -> None:
    """Changes that were accepted while RabbitMQ was unavailable are old when it returns, but they wait in a journal."""
    restaurant = await register_restaurant(system)
    (old,) = await pending(restaurant)
    clock = 1_000.0
    last_heartbeats: datetime | None = now() - timedelta(minutes=10)

    async def lanes_emptied() -> datetime | None:
        return last_heartbeats

    settings = settings_of(system, lost_message_seconds=60.0)
    async with CommandSession(settings) as session:
        lost_messages = LostMessages(
            settings,
            session.postgres,
            session.mirror,
            session.rail,
            lanes_emptied=lanes_emptied,
            clock=lambda: clock,
        )
        for pause in (0.0, 600.0):  # RabbitMQ is unavailable: no heartbeat arrives
            clock += pause
            assert await lost_messages.record_when_due() == 0
        last_heartbeats = now()  # RabbitMQ is back
        for pause in (0.0, 59.0):
            clock += pause
            assert await lost_messages.record_when_due() == 0
        last_heartbeats = None  # one lane has no known heartbeat any more, so the wait starts again
        assert await lost_messages.record_when_due() == 0
        last_heartbeats = now()
        for pause in (1.0, 59.0):
            clock += pause
            assert await lost_messages.record_when_due() == 0
        assert await versions(restaurant, [old]) == [[]]
        clock += 1.0
        assert await lost_messages.record_when_due() > 0
    await eventually(
        lambda: versions(restaurant, [old]), what="the orders as new versions", until=lambda found: found == [[2]]
    )


async def test_lanes_are_empty_only_after_a_heartbeat_came_through_each(system: System) -> None:
    async with system.database("ticketrail_owner") as connection:
        assert await lanes_emptied(connection) is not None
        undone = connection.transaction()
        await undone.start()
        await connection.execute("delete from heartbeats where lane = 'background'")
        assert await lanes_emptied(connection) is None
        await undone.rollback()


async def test_failed_young_and_unrecordable_changes_do_not_stop_the_others(system: System) -> None:
    restaurant = await register_restaurant(system)
    (failed,) = await pending(restaurant)
    (young,) = await pending(restaurant, age=0)
    (broken,) = await pending(restaurant, created_at=datetime(2300, 1, 1, tzinfo=UTC))
    lost = await pending(restaurant, count=2)
    async with CommandSession(settings_of(system)) as session:
        _, (document,) = await session.mirror.read(restaurant.id, "order", [failed])
        assert document is not None
        failure = json.dumps({"error": "x", "attempts": 3, "last_attempt": now().isoformat()}).encode()
        noted = FailedState(restaurant.id, "order", failed, document.head.change_id, failure)
        assert await session.mirror.note_failures([noted]) == []
    async with reconciler_of(system, lost_message_seconds=30.0) as reconciler:
        assert await reconciler.lost_messages.record_again() == 2
    await eventually(
        lambda: versions(restaurant, lost), what="the orders as new versions", until=lambda found: found == [[2], [2]]
    )
    assert await versions(restaurant, [failed, young, broken]) == [[], [], []]


async def test_old_open_orders_do_not_keep_older_closed_orders_in_the_mirror(system: System) -> None:
    """The mirror is as after an import: more than one block of orders that stay, then orders that must go."""
    restaurant = await register_restaurant(system)
    at = now() - timedelta(days=30)
    fields: dict[str, Any] = {"restaurant_id": restaurant.id, "items": 1, "updated_at": at}
    stay = [
        builders.order(**fields, created_at=at + timedelta(seconds=number), status=orders.OrderStatus.READY)
        for number in range(620)
    ]
    go = [
        builders.order(**fields, created_at=at - timedelta(seconds=number), status=orders.OrderStatus.COMPLETED)
        for number in range(3)
    ]
    await put(restaurant, stay, at, "stored")
    async with CommandSession(settings_of(system)) as session:
        written = [builders.change(order) for order in go]
        decoded = [DecodedChange(Lane.CRITICAL, orders.ENTITY, one, orders.ENTITY.decode(one)) for one in written]
        async with session.postgres.connection() as connection:
            await write_batch(connection, decoded, timeout_seconds=5.0)
        await session.mirror.apply([applied(one, "stored") for one in written])
        reconciler = Reconciler(session.settings, session.postgres, session.mirror, session.rail)
        assert await reconciler.trim() >= len(go)
        live = set(await session.mirror.live_ids(restaurant.id, "order"))
    assert live == {order.id for order in stay}
