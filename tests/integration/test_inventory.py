"""The inventory over HTTP: orders reduce the stock, deliveries increase it, and no order takes more than there is."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Any, cast
from uuid import uuid4

import httpx
import pytest
from msgspec import structs

from services.orders.derived_figures import DerivedFigures
from services.orders.entity_reads import EntityReads
from shared.entities.contract import Change, Lane
from shared.entities.inventory_item import ENTITY as ITEM
from shared.entities.inventory_item import StockMove
from shared.mirror.mirror import Mirror
from shared.postgres.pool import Postgres
from shared.security.tokens import Role
from shared.settings import Settings
from tests.rigs.builders import change
from tests.rigs.recorded_changes import recorded
from tests.rigs.restaurant import RestaurantRig, expect, made, refused, register_restaurant
from tests.rigs.system import System, eventually


@pytest.fixture(scope="module")
async def restaurant(system: System) -> RestaurantRig:
    return await register_restaurant(system)


async def stock(restaurant: RestaurantRig, quantity: int, **fields: Any) -> str:
    """Creates an inventory item and returns its path."""
    async with restaurant.client() as staff:
        found = made(await staff.post("/api/inventory", json={"name": "Dough", "quantity": quantity, **fields}))
    assert (found["available"], found["held"]) == (quantity, 0)
    return f"/api/inventory/{found['id']}"


def id_of(path: str) -> str:
    return path.rpartition("/")[2]


async def dish(restaurant: RestaurantRig, *consumes: tuple[str, int], name: str = "Pizza") -> str:
    needs = [{"inventory_item_id": id_of(path), "quantity": quantity} for path, quantity in consumes]
    return str((await restaurant.dish(name=name, consumes=needs))["id"])


def of(*items: tuple[str, int]) -> dict[str, Any]:
    return {"items": [{"menu_item_id": dish, "quantity": quantity} for dish, quantity in items]}


async def place(client: httpx.AsyncClient, *items: tuple[str, int]) -> str:
    return f"/api/orders/{made(await client.post('/api/orders', json=of(*items)))['id']}"


async def left(client: httpx.AsyncClient, item: str) -> int:
    found = expect(await client.get(item))
    # The three figures must agree at every moment.
    if found["available"] != found["quantity"] - found["held"]:
        pytest.fail(str(found))
    return int(found["available"])


async def stored(restaurant: RestaurantRig, item: str) -> int:
    """Waits until PostgreSQL has all changes; returns the available amount in PostgreSQL."""
    async with restaurant.system.database() as connection:

        async def pending() -> int:
            mirror = Mirror(restaurant.system.redis.url, timeout=5.0, stale_seconds=60)
            try:
                return sum([(await mirror.counts(restaurant.id, name))[0] for name in ("order", "inventory_item")])
            finally:
                await mirror.close()

        await eventually(pending, what="everything in PostgreSQL", until=lambda count: count == 0)
        held = await connection.fetchval(
            "select coalesce(sum(h.quantity), 0)::int8 from order_holds h"
            " join orders o on o.id = h.order_id join inventory_items i on i.id = h.inventory_item_id"
            " where i.id = $1 and h.held_at >= i.counted_at and o.status <> 'cancelled' and o.deleted_at is null",
            id_of(item),
        )
        quantity = await connection.fetchval("select quantity from inventory_items where id = $1", id_of(item))
    return int(quantity - held)


async def repeat(restaurant: RestaurantRig, changes: Sequence[Change]) -> None:
    """Publishes the events again several times, in other orders; returns when both writers have consumed them."""
    for _ in range(3):
        await restaurant.publish(*reversed(changes), *changes)
    async with restaurant.client() as staff:
        path = await place(staff, (await dish(restaurant), 1))
        await recorded(restaurant, id_of(path), 1)

        async def synced() -> str:
            return str(expect(await staff.get(path))["sync"]["state"])

        await eventually(synced, until=lambda state: state == "synced")


# -- accepting ---------------------------------------------------------------------------------------------------


async def test_order_that_exceeds_the_stock_is_refused_and_lists_the_stock_that_is_left(
    restaurant: RestaurantRig,
) -> None:
    dough, basil = await stock(restaurant, 5), await stock(restaurant, 100, name="Basil")
    cola, pizza = await dish(restaurant, name="Cola"), await dish(restaurant, (dough, 2), (basil, 1), name="Margherita")
    calzone = await dish(restaurant, (dough, 1), name="Calzone")
    async with restaurant.client() as staff:
        await place(staff, (pizza, 1))
        reply = await staff.post("/api/orders", json=of((cola, 3), (pizza, 1), (calzone, 2)))
        details = refused(reply, 409, "out_of_stock", "items[1].quantity")
        assert details["items"] == [
            {"inventory_item_id": id_of(dough), "available": 3, "menu_item_ids": sorted([pizza, calzone])}
        ]
        assert reply.json()["error"]["message"] == "not enough stock for Margherita, Calzone"
        assert [await left(staff, one) for one in (dough, basil)] == [3, 99]
        await place(staff, (pizza, 1), (calzone, 1))
        assert await left(staff, dough) == 0
        await place(staff, (cola, 1))


async def test_concurrent_orders_of_one_dish_sell_exactly_the_stock(restaurant: RestaurantRig) -> None:
    dough = await stock(restaurant, 50)
    pizza = await dish(restaurant, (dough, 1))
    async with restaurant.client() as staff:
        replies = await asyncio.gather(*(staff.post("/api/orders", json=of((pizza, 1))) for _ in range(120)))
        outcomes = Counter(
            (reply.status_code, None if reply.status_code == 201 else reply.json()["error"]["code"])
            for reply in replies
        )
        assert outcomes == {(201, None): 50, (409, "out_of_stock"): 70}
        assert {one.json()["error"]["details"]["items"][0]["available"] for one in replies if one.is_error} == {0}
        assert await left(staff, dough) == 0
    assert await stored(restaurant, dough) == 0


async def test_dishes_with_a_shared_ingredient_share_its_stock(restaurant: RestaurantRig) -> None:
    dough = await stock(restaurant, 60)
    small, large = await dish(restaurant, (dough, 1)), await dish(restaurant, (dough, 3))
    async with restaurant.client() as staff:
        replies = await asyncio.gather(
            *(staff.post("/api/orders", json=of(((small, large)[n % 2], 1))) for n in range(80))
        )
        sold = sum((1, 3)[n % 2] for n, reply in enumerate(replies) if reply.status_code == 201)
        assert {reply.status_code for reply in replies} == {201, 409}
        assert await left(staff, dough) == 60 - sold
        assert 60 - sold < 3
        assert [one.status_code for one in [await staff.post("/api/orders", json=of((small, 60 - sold + 1)))]] == [409]


async def test_repeat_with_the_same_key_takes_stock_once_and_succeeds_when_none_is_left(
    restaurant: RestaurantRig,
) -> None:
    dough = await stock(restaurant, 3)
    pizza = await dish(restaurant, (dough, 1))
    key = {"Idempotency-Key": str(uuid4())}
    async with restaurant.client() as staff:
        replies = await asyncio.gather(*(staff.post("/api/orders", json=of((pizza, 2)), headers=key) for _ in range(8)))
        assert len({made(reply)["id"] for reply in replies}) == 1
        assert await left(staff, dough) == 1
        await place(staff, (pizza, 1))
        assert made(await staff.post("/api/orders", json=of((pizza, 2)), headers=key))["id"] == made(replies[0])["id"]
        refused(await staff.post("/api/orders", json=of((pizza, 1))), 409, "out_of_stock")
        assert await left(staff, dough) == 0


# -- changing ----------------------------------------------------------------------------------------------------


async def test_changed_items_take_and_return_the_difference(restaurant: RestaurantRig) -> None:
    dough, cheese = await stock(restaurant, 5), await stock(restaurant, 5, name="Cheese")
    pizza, toast, cola = await dish(restaurant, (dough, 1)), await dish(restaurant, (cheese, 2)), await dish(restaurant)
    async with restaurant.client() as staff:
        order = await place(staff, (pizza, 3))
        expect(await staff.put(order, json=of((pizza, 5))))
        assert await left(staff, dough) == 0
        details = refused(await staff.put(order, json=of((pizza, 6))), 409, "out_of_stock", "items[0].quantity")
        assert details["items"][0]["available"] == 5  # the order's own amount is included
        expect(await staff.put(order, json=of((pizza, 1), (toast, 2))))
        assert [await left(staff, one) for one in (dough, cheese)] == [4, 1]
        expect(await staff.put(order, json=of((cola, 1))))
        assert [await left(staff, one) for one in (dough, cheese)] == [5, 5]
        expect(await staff.put(order, json={"notes": "no ice"}))
    assert [await stored(restaurant, one) for one in (dough, cheese)] == [5, 5]


async def test_cancelled_order_returns_its_stock_once_however_often_its_events_arrive(
    restaurant: RestaurantRig,
) -> None:
    dough = await stock(restaurant, 10)
    pizza = await dish(restaurant, (dough, 1))
    async with restaurant.client() as staff:
        kept, order = await place(staff, (pizza, 3)), await place(staff, (pizza, 2))
        expect(await staff.put(order, json=of((pizza, 4))))
        expect(await staff.put(order, json={"status": "cancelled"}))
        assert await left(staff, dough) == 7
        events = [*await recorded(restaurant, id_of(order), 3), *await recorded(restaurant, id_of(kept), 1)]
        await repeat(restaurant, events)
        assert await left(staff, dough) == 7
    assert await stored(restaurant, dough) == 7


async def test_order_is_restored_if_the_stock_suffices_and_refused_otherwise(restaurant: RestaurantRig) -> None:
    dough = await stock(restaurant, 3)
    pizza = await dish(restaurant, (dough, 1))
    async with restaurant.client() as staff:
        order = await place(staff, (pizza, 2))
        expect(await staff.delete(order))
        assert await left(staff, dough) == 3
        await place(staff, (pizza, 2))
        details = refused(await staff.post(f"{order}/restore"), 409, "out_of_stock")
        assert details["items"] == [{"inventory_item_id": id_of(dough), "available": 1}]
        refused(await staff.get(order), 404, "order_deleted")
        made_ = await staff.post(f"{dough}/moves", json={"quantity": 4})
        assert expect(made_)["available"] == 5
        expect(await staff.post(f"{order}/restore"))
        refused(await staff.post(f"{order}/restore"), 409, "not_deleted")
        assert await left(staff, dough) == 3
    assert await stored(restaurant, dough) == 3


# -- counting and moving -----------------------------------------------------------------------------------------


async def test_recount_sets_the_current_stock_and_later_orders_reduce_it(restaurant: RestaurantRig) -> None:
    dough = await stock(restaurant, 10)
    pizza = await dish(restaurant, (dough, 1))
    async with restaurant.client() as staff:
        before, deleted = await place(staff, (pizza, 4)), await place(staff, (pizza, 2))
        expect(await staff.delete(deleted))
        renamed = expect(await staff.put(dough, json={"name": "Fresh dough", "low_at": 2}))
        # Renaming the item does not count as a recount.
        assert (renamed["available"], renamed["held"]) == (6, 4)
        counted = expect(await staff.put(dough, json={"quantity": 3}))
        assert (counted["available"], counted["held"]) == (3, 0)
        refused(await staff.put(before, json=of((pizza, 8))), 409, "out_of_stock")
        expect(await staff.put(before, json=of((pizza, 5))))
        assert await left(staff, dough) == 2
        expect(await staff.post(f"{deleted}/restore"))
        assert await left(staff, dough) == 0
        expect(await staff.put(before, json={"status": "cancelled"}))
        assert await left(staff, dough) == 1
        # This is a recount, although the number is the same.
        assert expect(await staff.put(dough, json={"quantity": 3}))["available"] == 3
    assert await stored(restaurant, dough) == 3


async def test_concurrent_moves_count_once_each(restaurant: RestaurantRig) -> None:
    dough = await stock(restaurant, 10)
    pizza = await dish(restaurant, (dough, 1))
    ids = [str(uuid4()) for _ in range(12)]
    async with restaurant.client() as staff:
        moves = [staff.post(f"{dough}/moves", json={"quantity": 2, "id": one, "reason": "delivery"}) for one in ids * 2]
        orders = [staff.post("/api/orders", json=of((pizza, 1))) for _ in range(10)]
        replies = await asyncio.gather(*moves, *orders)
        assert Counter(reply.status_code for reply in replies) == {200: 24, 201: 10}
        assert await left(staff, dough) == 10 + 24 - 10
        details = refused(
            await staff.post(f"{dough}/moves", json={"quantity": 3, "id": ids[0], "reason": "delivery"}),
            409,
            "move_id_reused",
            "id",
        )
        assert details == {"field": "id"}
        refused(await staff.post(f"{dough}/moves", json={"quantity": 0}), 422, "invalid_input", "quantity")
        details = refused(await staff.post(f"{dough}/moves", json={"quantity": -35}), 409, "below_zero", "quantity")
        assert details["quantity"] == 34
        assert expect(await staff.post(f"{dough}/moves", json={"quantity": -4, "reason": "burnt"}))["available"] == 20
    assert await stored(restaurant, dough) == 20
    async with restaurant.system.database() as connection:
        found = await connection.fetch(
            "select quantity from stock_moves where inventory_item_id = $1 order by quantity", id_of(dough)
        )
    assert [row["quantity"] for row in found] == [-4, *[2] * 12]


async def test_old_move_is_recognised_after_it_has_left_the_state(restaurant: RestaurantRig) -> None:
    dough, first = await stock(restaurant, 0), {"quantity": 5, "id": str(uuid4()), "reason": "the first"}
    async with restaurant.client() as staff:
        expect(await staff.post(f"{dough}/moves", json=first))
        base = (await recorded(restaurant, id_of(dough), 2))[-1]
        item = ITEM.decode(base)
        others = tuple(StockMove(id=str(uuid4()), quantity=1, created_at=item.updated_at) for _ in range(200))
        await restaurant.publish(change(structs.replace(item, quantity=205, moves=others), base=base), lane=Lane.NORMAL)
        await eventually(lambda: left(staff, dough), what="the other moves", until=lambda found: found == 205)
        assert await stored(restaurant, dough) == 205
        assert expect(await staff.post(f"{dough}/moves", json=first))["quantity"] == 205
        refused(await staff.post(f"{dough}/moves", json={**first, "quantity": 6}), 409, "move_id_reused", "id")


async def test_low_stock_is_marked(restaurant: RestaurantRig) -> None:
    dough, salt = await stock(restaurant, 5, low_at=3), await stock(restaurant, 0)
    pizza = await dish(restaurant, (dough, 1))
    async with restaurant.client() as staff:

        async def low() -> dict[str, bool]:
            found = expect(await staff.get("/api/inventory?limit=200&fields=low,available"))
            assert set(found[0]) == {"id", "low", "available"}
            return {one["id"]: one["low"] for one in found}

        assert not (await low())[id_of(dough)]
        await place(staff, (pizza, 2))
        assert (await low())[id_of(dough)]
        # Salt has no `low_at`, so it is never low.
        assert not (await low())[id_of(salt)]
        assert not expect(await staff.post(f"{dough}/moves", json={"quantity": 1}))["low"]
        refused(await staff.put(dough, json={"low_at": -1}), 422, "invalid_input", "low_at")


async def test_dish_that_consumes_an_unknown_inventory_item_is_refused(restaurant: RestaurantRig) -> None:
    dough, other = await stock(restaurant, 1), await register_restaurant(restaurant.system)
    async with (
        restaurant.client() as staff,
        restaurant.client(Role.ADMIN) as admin,
        other.client(Role.ADMIN) as stranger,
    ):
        body = {"name": "Pizza", "price": 1, "category": "Mains"}
        needs = [{"inventory_item_id": id_of(dough), "quantity": 1}]
        reply = await stranger.post("/api/menu", json={**body, "consumes": needs})
        refused(reply, 422, "unknown_inventory_item", "consumes[0].inventory_item_id")
        assert (await stranger.get(dough)).status_code == 404
        assert (await stranger.post(f"{dough}/moves", json={"quantity": 1})).status_code == 404
        reply = await admin.post("/api/menu", json={**body, "consumes": needs * 2})
        refused(reply, 422, "invalid_input", "consumes")
        expect(await staff.delete(dough))
        reply = await admin.post("/api/menu", json={**body, "consumes": needs})
        refused(reply, 422, "unknown_inventory_item", "consumes[0].inventory_item_id")
        expect(await staff.post(f"{dough}/restore"))
        assert await left(staff, dough) == 1


# -- reads -------------------------------------------------------------------------------------------------------


async def test_stock_comes_from_postgres_without_the_mirror_and_is_unknown_without_both(
    restaurant: RestaurantRig,
) -> None:
    dough = await stock(restaurant, 9, low_at=7)
    async with restaurant.client() as staff:
        await place(staff, (await dish(restaurant, (dough, 1)), 2))
        assert await stored(restaurant, dough) == 7
    settings = Settings(_env_file=None, database_timeout_seconds=15.0)
    async with restaurant.system.database() as connection:
        state = await connection.fetchval(
            "select (c.data->'after')::text from inventory_items t join changes c using (restaurant_id, change_id)"
            " where t.id = $1",
            id_of(dough),
        )
    item = ITEM.decode_state(state.encode())
    unavailable = Mirror("redis://127.0.0.1:1/0", timeout=0.2, stale_seconds=60)
    for url, expected in (
        (restaurant.system.database_url("ticketrail_api"), {"available": 7, "held": 2, "low": True}),
        ("postgresql://nobody@127.0.0.1:1/none", {"available": None, "held": None, "low": None}),
    ):
        postgres = Postgres(url, settings)
        figures = DerivedFigures(cast(EntityReads, None), postgres, unavailable)
        assert await figures.available(restaurant.id, [item]) == [expected]
        await postgres.close()
    await unavailable.close()


async def test_figures_of_a_state_that_has_changed_since_it_was_read_agree(restaurant: RestaurantRig) -> None:
    dough = await stock(restaurant, 5)
    async with restaurant.client() as staff:
        await place(staff, (await dish(restaurant, (dough, 1)), 2))
        expect(await staff.post(f"{dough}/moves", json={"quantity": 200}))
        assert await stored(restaurant, dough) == 203
        first, moved = [ITEM.decode(one) for one in await recorded(restaurant, id_of(dough), 2)]
        mirror = Mirror(restaurant.system.redis.url, timeout=5.0, stale_seconds=60)
        postgres = Postgres(
            restaurant.system.database_url("ticketrail_api"), Settings(_env_file=None, database_timeout_seconds=15.0)
        )
        figures = DerivedFigures(cast(EntityReads, None), postgres, mirror)
        for item, available in ((first, 3), (moved, 203)):
            assert await figures.available(restaurant.id, [item]) == [{"available": available, "held": 2, "low": False}]
        # The recount is after the order, so only the older state still has its holds.
        expect(await staff.put(dough, json={"quantity": 7}))
        assert await stored(restaurant, dough) == 7
        recounted = ITEM.decode((await recorded(restaurant, id_of(dough), 3))[-1])
        for item, available, held in ((moved, 203, 2), (recounted, 7, 0)):
            assert await figures.available(restaurant.id, [item]) == [
                {"available": available, "held": held, "low": False}
            ]
        await postgres.close()
        await mirror.close()


# -- random operations -------------------------------------------------------------------------------------------


async def test_concurrent_random_operations_leave_the_stock_that_postgres_has(restaurant: RestaurantRig) -> None:
    chance = Random(7)
    items = [await stock(restaurant, 25) for _ in range(3)]
    dishes = [
        await dish(restaurant, (items[0], 1)),
        await dish(restaurant, (items[0], 2), (items[1], 1)),
        await dish(restaurant),
    ]
    dishes.append(await dish(restaurant, (items[2], 3)))
    codes: Counter[str] = Counter()

    async def work(staff: httpx.AsyncClient, seed: int) -> None:
        chance, mine = Random(seed), list[str]()
        for _ in range(12):
            body: Any = of(*((one, chance.randrange(1, 4)) for one in chance.sample(dishes, k=chance.randrange(1, 3))))
            action = chance.choice(("place", "place", "items", "status", "delete", "restore", "deliver", "count"))
            if action == "place" or not mine:
                reply = await staff.post("/api/orders", json=body, headers={"Idempotency-Key": str(uuid4())})
                if reply.status_code == 201:
                    mine.append(f"/api/orders/{reply.json()['data']['id']}")
            elif action == "items":
                reply = await staff.put(chance.choice(mine), json=body)
            elif action == "status":
                status = chance.choice(("received", "cancelled"))
                reply = await staff.put(chance.choice(mine), json={"status": status})
            elif action == "delete":
                reply = await staff.delete(chance.choice(mine))
            elif action == "restore":
                reply = await staff.post(f"{chance.choice(mine)}/restore")
            elif action == "deliver":
                reply = await staff.post(f"{chance.choice(items)}/moves", json={"quantity": chance.randrange(1, 5)})
            else:
                reply = await staff.put(chance.choice(items), json={"quantity": chance.randrange(20)})
            codes["done" if reply.is_success else reply.json()["error"]["code"]] += 1

    async with restaurant.client() as staff:
        await asyncio.gather(*(work(staff, chance.randrange(10**6)) for _ in range(12)))
        assert codes["done"] > 50
        assert codes["out_of_stock"] > 5
        assert not codes["internal"]
        for item in items:
            shown = await left(staff, item)
            assert await stored(restaurant, item) == shown
