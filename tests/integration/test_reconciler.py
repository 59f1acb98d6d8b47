"""The reconciler records changes again whose message is lost, and does not treat late changes as lost."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import pytest

from services.sync.command_session import CommandSession
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


class Steady:
    """A ledger that has led for `seconds`, and knows these changes."""

    def __init__(self, seconds: float = 3_600.0, *changes: str) -> None:
        self.steady_seconds = seconds
        self.changes = changes

    def knows(self, change_id: str) -> bool:
        return change_id in self.changes


@pytest.fixture(scope="module")
async def impatient(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[System]:
    """A system that records lost changes again after a second."""
    own_redis = await asyncio.to_thread(servers.extra_redis)
    settings = {"lost_message_seconds": LOST_MESSAGE_SECONDS, "reconcile_interval_seconds": 0.2}
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


@pytest.mark.slow  # the ledger sends a change again only when nothing else can bring it
async def test_change_in_no_place_is_recorded_again_and_one_that_the_ledger_knows_is_not(impatient: System) -> None:
    restaurant = await register_restaurant(impatient)
    dish = (await restaurant.dish())["id"]
    await eventually(lambda: stored_dish(restaurant, dish), what="the dish in PostgreSQL")
    await impatient.stop("worker")
    purged = await place(restaurant, 3, dish)
    async with restaurant.client() as staff:
        paid = made(await staff.post(f"/api/orders/{purged[0]}/payments", json={"amount": 300, "method": "card"}))
    queue = f"/api/queues/{quote(impatient.name)}/{lane_queue(Lane.CRITICAL)}/contents"
    await asyncio.to_thread(ask, impatient.servers.rabbitmq.management_url, "DELETE", queue)
    nowhere = await pending(restaurant, count=2)
    impatient.start("worker")
    await impatient.ready("worker")
    await eventually(
        lambda: versions(restaurant, nowhere),
        within=60,
        what="the orders as new versions",
        until=lambda found: found == [[2], [2]],
    )
    # The ledger sends these to their lane again; they have waited for longer than the others.
    await eventually(
        lambda: versions(restaurant, purged),
        within=90,
        what="the orders of the purged lane",
        until=lambda found: found == [[1, 2], [1], [1]],
    )
    async with restaurant.client() as staff:
        for id_, version in zip([*purged, *nowhere], (2, 1, 1, 2, 2), strict=True):

            async def seen(id_: str = id_) -> dict[str, Any]:
                found: dict[str, Any] = expect(await staff.get(f"/api/orders/{id_}"))
                return found

            found = await eventually(
                seen, what="the state `synced`", until=lambda found: found["sync"]["state"] == "synced"
            )
            assert found["version"] == version
    async with impatient.database() as connection:
        rows = await connection.fetch(
            "select source, actor, lane from changes where entity_id = any($1::uuid[])", nowhere
        )
        payments = await connection.fetch("select id::text, amount from payments where order_id = $1", purged[0])
        assert await connection.fetchval("select count(*) from conflicts where restaurant_id = $1", restaurant.id) == 0
    assert {tuple(row) for row in rows} == {("sync", "reconciler", "critical")}
    assert [tuple(row) for row in payments] == [(paid["payment"]["id"], 300)]


async def stored_dish(restaurant: RestaurantRig, dish: str) -> bool:
    async with restaurant.system.database() as connection:
        return bool(await connection.fetchval("select count(*) from menu_items where id = $1", dish))


@asynccontextmanager
async def lost_messages_of(
    system: System, clock: Callable[[], float], ledger: Steady | None = None
) -> AsyncIterator[LostMessages]:
    """Lost messages of this process, for a system whose worker is not involved. They wait for 60 seconds."""
    async with CommandSession(settings_of(system, lost_message_seconds=60.0)) as session:
        yield LostMessages(
            session.settings, session.postgres, session.mirror, session.rail, ledger or Steady(), clock=clock
        )


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
    clock, ledger = 1_000.0, Steady(0.0)
    async with lost_messages_of(system, lambda: clock, ledger) as lost_messages:
        for pause in (0.0, 600.0):  # RabbitMQ is unavailable: the log delivers nothing
            clock += pause
            assert await lost_messages.record_when_due() == 0
        ledger.steady_seconds = 1.0  # RabbitMQ is back
        assert await lost_messages.record_again() == 0
        clock += 58.0
        ledger.steady_seconds = 59.0
        assert await lost_messages.record_when_due() == 0
        ledger.steady_seconds = 0.0  # another interruption, so the wait starts again
        assert await lost_messages.record_again() == 0
        # Between the second and the third look there was an interruption too.
        for pause, ledger.steady_seconds in ((1.0, 1.0), (30.0, 31.0), (60.0, 1.0), (58.0, 59.0)):
            clock += pause
            assert await lost_messages.record_again() == 0
        assert await versions(restaurant, [old]) == [[]]
        clock += 1.0
        ledger.steady_seconds = 60.0
        assert await lost_messages.record_again() > 0
    await eventually(
        lambda: versions(restaurant, [old]), what="the orders as new versions", until=lambda found: found == [[2]]
    )


async def test_state_waits_from_the_moment_at_which_it_was_seen_pending(system: System) -> None:
    restaurant = await register_restaurant(system)
    (first,) = await pending(restaurant)
    clock = 1_000.0
    async with lost_messages_of(system, lambda: clock) as lost_messages:
        assert await lost_messages.record_again() == 0
        clock += 59.0
        (second,) = await pending(restaurant)  # it is as old as the first one by the clock of its host
        assert await lost_messages.record_again() == 0
        clock += 1.0
        assert await lost_messages.record_again() >= 1
    await eventually(
        lambda: versions(restaurant, [first, second]), what="the first order", until=lambda found: found == [[2], []]
    )


async def test_failed_known_and_unrecordable_changes_do_not_stop_the_others(system: System) -> None:
    restaurant = await register_restaurant(system)
    (failed,) = await pending(restaurant)
    (known,) = await pending(restaurant)
    (broken,) = await pending(restaurant, created_at=datetime(2300, 1, 1, tzinfo=UTC))
    lost = await pending(restaurant, count=2)
    async with CommandSession(settings_of(system)) as session:
        _, documents = await session.mirror.read(restaurant.id, "order", [failed, known])
        changes = [document.head.change_id for document in documents if document is not None]
        failure = json.dumps({"error": "x", "attempts": 3, "last_attempt": now().isoformat()}).encode()
        noted = FailedState(restaurant.id, "order", failed, changes[0], failure)
        assert await session.mirror.note_failures([noted]) == []
    clock = 1_000.0
    async with lost_messages_of(system, lambda: clock, Steady(3_600.0, changes[1])) as lost_messages:
        await lost_messages.record_again()
        clock += 60.0
        assert await lost_messages.record_again() >= 2
    await eventually(
        lambda: versions(restaurant, lost), what="the orders as new versions", until=lambda found: found == [[2], [2]]
    )
    assert await versions(restaurant, [failed, known, broken]) == [[], [], []]


async def test_state_behind_postgres_is_loaded(system: System) -> None:
    restaurant = await register_restaurant(system)
    old = builders.order(restaurant_id=restaurant.id, notes="old")
    first = builders.change(old)
    second = builders.change(builders.order(restaurant_id=restaurant.id, id=old.id, notes="new"), base=first)
    clock = 1_000.0
    async with lost_messages_of(system, lambda: clock) as lost_messages, CommandSession(settings_of(system)) as session:
        written = [
            DecodedChange(Lane.CRITICAL, orders.ENTITY, one, orders.ENTITY.decode(one)) for one in (first, second)
        ]
        async with session.postgres.connection() as connection:
            await write_batch(connection, written, timeout_seconds=5.0)
        await eventually(lambda: head(session, restaurant, old.id), what="the order", until=lambda v: v == 2)
        await session.mirror.trim(restaurant.id, "order", {old.id: second.id})
        await session.mirror.apply([applied(first)])
        assert await head(session, restaurant, old.id) == 1
        await lost_messages.record_again()
        clock += 60.0
        await lost_messages.record_again()
        assert await head(session, restaurant, old.id) == 2
    assert await versions(restaurant, [old.id]) == [[1, 2]]


async def head(session: CommandSession, restaurant: RestaurantRig, id_: str) -> int:
    _, (document,) = await session.mirror.read(restaurant.id, "order", [id_])
    return 0 if document is None else document.head.version


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
        reconciler = Reconciler(session.settings, session.postgres, session.mirror, session.rail, Steady(0.0))
        assert await reconciler.trim() >= len(go)
        live = set(await session.mirror.live_ids(restaurant.id, "order"))
    assert live == {order.id for order in stay}
