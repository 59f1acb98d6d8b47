"""The menu over HTTP: dishes, categories, brands, prices and availability."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import httpx
import pytest

from deploy.local.port_check import find_free
from shared.security.tokens import Role
from tests.rigs.http_client import http_client
from tests.rigs.restaurant import RestaurantRig, expect, made, refused, register_restaurant
from tests.rigs.system import System, eventually

SIZE = {
    "name": "size",
    "min_choices": 1,
    "max_choices": 1,
    "options": [
        {"name": "regular"},
        {"name": "large", "price": 250},
        {"name": "giant", "price": 900, "is_available": False},
    ],
}
EXTRAS = {
    "name": "extras",
    "max_choices": 2,
    "options": [{"name": "egg", "price": 120}, {"name": "cheese", "price": 80}],
}


@pytest.fixture(scope="module")
async def restaurant(system: System) -> RestaurantRig:
    return await register_restaurant(system)


def body(*dishes: str, **item: Any) -> dict[str, Any]:
    return {"items": [{"menu_item_id": dish, "quantity": 1, **item} for dish in dishes]}


def chosen(*options: tuple[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "option": option} for name, option in options]


async def test_dish_keeps_all_its_fields(restaurant: RestaurantRig) -> None:
    fields = {
        "name": "Pizza",
        "price": 980,
        "category": f"Mains {uuid4()}",
        "description": "with basil",
        "brand": f"House {uuid4()}",
        "is_available": False,
        "image_url": "https://example.com/pizza.jpg",
    }
    groups = [SIZE, EXTRAS]
    dish = await restaurant.dish(**fields, customizations=groups)
    async with restaurant.client(Role.CUSTOMER, session="guest") as guest:
        seen = expect(await guest.get(f"/api/menu/{dish['id']}"))
        assert {name: seen[name] for name in fields} == fields
        size, extras = seen["customizations"]
        assert [(one["name"], one["price"], one["is_available"]) for one in size["options"]] == [
            ("regular", 0, True),
            ("large", 250, True),
            ("giant", 900, False),
        ]
        assert (extras["min_choices"], extras["max_choices"]) == (0, 2)
        queries: list[dict[str, Any]] = [{"category": fields["category"]}, {"brand": fields["brand"]}]
        for query in queries:
            assert [one["id"] for one in expect(await guest.get("/api/menu", params=query))] == [dish["id"]]
            nothing = await guest.get("/api/menu", params={**query, "is_available": "true"})
            assert expect(nothing) == []

    async def stored() -> Any:
        async with restaurant.system.database() as connection:
            return await connection.fetchrow("select * from menu_items where id = $1", dish["id"])

    row = await eventually(stored, what="the dish in PostgreSQL")
    assert {name: row[name] for name in fields} == fields


async def test_categories_and_brands_are_separate(restaurant: RestaurantRig) -> None:
    async with restaurant.client(Role.ADMIN) as admin:
        category = made(await admin.post("/api/menu/categories", json={"name": "Soups", "position": 3}))
        brand = made(await admin.post("/api/menu/brands", json={"name": "Fritz", "description": "from Hamburg"}))
        assert [one["id"] for one in expect(await admin.get("/api/menu/categories"))] == [category["id"]]
        assert [one["id"] for one in expect(await admin.get("/api/menu/brands"))] == [brand["id"]]
        assert category["position"] == 3
        refused(await admin.get(f"/api/menu/brands/{category['id']}"), 404, "not_found")


async def test_only_an_admin_may_change_the_menu(restaurant: RestaurantRig) -> None:
    dish = await restaurant.dish()
    for client in (restaurant.client(Role.STAFF), restaurant.client(Role.CUSTOMER, session="guest")):
        async with client as caller:
            for reply in (
                await caller.post("/api/menu", json={"name": "x", "price": 1, "category": "x"}),
                await caller.put(f"/api/menu/{dish['id']}", json={"price": 1}),
                await caller.delete(f"/api/menu/{dish['id']}"),
                await caller.post("/api/menu/categories", json={"name": "x"}),
                await caller.post("/api/menu/brands", json={"name": "x"}),
            ):
                refused(reply, 403, "forbidden")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"price": -1}, "price"),
        ({"price": 9.5}, "price"),
        ({"image_url": "javascript:alert(1)"}, "image_url"),
        ({"name": "a\0b"}, "name"),
        ({"colour": "red"}, "colour"),
        ({"customizations": [SIZE, EXTRAS, SIZE]}, "customizations[2].name"),
        ({"customizations": [{**SIZE, "min_choices": 2}]}, "customizations[0].min_choices"),
        ({"customizations": [{**SIZE, "options": []}]}, "customizations[0].options"),
        ({"customizations": [{**SIZE, "options": [{"name": "a"}, {"name": "a"}]}]}, "customizations[0].options"),
        ({"customizations": [{**SIZE, "options": [{"name": "a", "price": -5}]}]}, "customizations[0].options[0].price"),
        (
            {"consumes": [{"inventory_item_id": "8ff4c1de-96a5-4c0a-8d57-5b3a3b6a1f10", "quantity": 1}]},
            "consumes[0].inventory_item_id",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_invalid_dish_is_refused_with_the_name_of_the_field(
    restaurant: RestaurantRig, fields: dict[str, Any], field: str
) -> None:
    dish = await restaurant.dish()
    async with restaurant.client(Role.ADMIN) as admin:
        for reply in (
            await admin.post("/api/menu", json={"name": "x", "price": 1, "category": "x", **fields}),
            await admin.put(f"/api/menu/{dish['id']}", json=fields),
        ):
            assert expect(reply, 422)["details"]["field"] == field


async def test_prices_of_placed_orders_never_change(restaurant: RestaurantRig) -> None:
    dish = await restaurant.dish(name="Thali", price=1_000, customizations=[SIZE])
    async with restaurant.client() as staff, restaurant.client(Role.ADMIN) as admin:
        placed = made(
            await staff.post("/api/orders", json=body(dish["id"], customizations=chosen(("size", "large")), quantity=2))
        )
        assert (placed["items"][0]["unit_price"], placed["subtotal"]) == (1_250, 2_500)
        dearer = {**SIZE, "options": [{"name": "large", "price": 999}]}
        change = {"name": "Royal thali", "price": 2_000, "customizations": [dearer]}
        expect(await admin.put(f"/api/menu/{dish['id']}", json=change))
        expect(await admin.delete(f"/api/menu/{dish['id']}"))
        url = f"/api/orders/{placed['id']}"
        assert expect(await staff.get(url))["items"] == placed["items"]
        changed = expect(await staff.put(url, json={"tip_amount": 100, "status": "received"}))
        assert changed["items"] == placed["items"]
        assert changed["total"] == placed["total"] + 100

        async def stored() -> Any:
            async with restaurant.system.database() as connection:
                return await connection.fetchrow(
                    "select o.version, o.subtotal, i.name, i.unit_price, i.line_total"
                    " from orders o join order_items i on i.order_id = o.id where o.id = $1",
                    placed["id"],
                )

        row = await eventually(stored, what="version 2", until=lambda found: found and found["version"] == 2)
    assert tuple(row) == (2, 2_500, "Thali", 1_250, 2_500)


async def test_new_price_counts_from_the_next_order_on(restaurant: RestaurantRig) -> None:
    dish = await restaurant.dish(price=1_000)
    async with restaurant.client() as staff, restaurant.client(Role.ADMIN) as admin:
        for price in (1_100, 1_200, 1_300):
            expect(await admin.put(f"/api/menu/{dish['id']}", json={"price": price}))
            assert made(await staff.post("/api/orders", json=body(dish["id"])))["items"][0]["unit_price"] == price


async def test_deleted_dish_is_not_sold_until_it_is_restored(restaurant: RestaurantRig) -> None:
    dish = await restaurant.dish()
    async with restaurant.client() as staff, restaurant.client(Role.ADMIN) as admin:
        expect(await admin.delete(f"/api/menu/{dish['id']}"))
        refused(
            await staff.post("/api/orders", json=body(dish["id"])), 422, "unknown_menu_item", "items[0].menu_item_id"
        )
        expect(await admin.post(f"/api/menu/{dish['id']}/restore"))
        made(await staff.post("/api/orders", json=body(dish["id"])))


async def test_server_prices_the_choices(restaurant: RestaurantRig) -> None:
    dish = await restaurant.dish(price=1_000, customizations=[SIZE, EXTRAS])
    options = chosen(("size", "large"), ("extras", "egg"), ("extras", "cheese"))
    async with restaurant.client(Role.CUSTOMER, session="guest") as guest:
        (item,) = made(await guest.post("/api/orders", json=body(dish["id"], customizations=options, quantity=3)))[
            "items"
        ]
        assert (item["unit_price"], item["line_total"]) == (1_450, 4_350)
        assert [one["price"] for one in item["customizations"]] == [250, 120, 80]
        # The same option twice costs twice as much, if two choices are allowed.
        twice = chosen(("size", "regular"), ("extras", "egg"), ("extras", "egg"))
        (item,) = made(await guest.post("/api/orders", json=body(dish["id"], customizations=twice)))["items"]
        assert item["unit_price"] == 1_240
        for price in ({"price": 1}, {"unit_price": 1}):
            priced = [{**options[0], **price}]
            reply = await guest.post("/api/orders", json=body(dish["id"], customizations=priced))
            assert expect(reply, 422)["details"]["field"] == f"items[0].customizations[0].{next(iter(price))}"


@pytest.mark.parametrize(
    ("options", "code", "field"),
    [
        ((), "customization_count", ""),
        ((("extras", "egg"),), "customization_count", ""),
        ((("size", "large"), ("size", "regular")), "customization_count", ""),
        ((("size", "large"), ("size", "large")), "customization_count", ""),
        ((("size", "large"), *[("extras", "egg")] * 3), "customization_count", ""),
        ((("size", "huge"),), "unknown_customization", "[0].option"),
        ((("size", "giant"),), "option_unavailable", "[0].option"),
        ((("size", "large"), ("sauce", "hot")), "unknown_customization", "[1].name"),
        ((("size", "egg"),), "unknown_customization", "[0].option"),
    ],
    ids=lambda value: str(value)[:50],
)
async def test_choice_that_the_dish_does_not_offer_is_refused(
    restaurant: RestaurantRig, options: tuple[tuple[str, str], ...], code: str, field: str
) -> None:
    plain, dish = await restaurant.dish(), await restaurant.dish(customizations=[SIZE, EXTRAS])
    async with restaurant.client(Role.CUSTOMER, session="guest") as guest:
        items = [*body(plain["id"])["items"], *body(dish["id"], customizations=chosen(*options))["items"]]
        reply = await guest.post("/api/orders", json={"items": items})
        refused(reply, 422, code, f"items[1].customizations{field}")
        reply = await guest.post("/api/orders", json=body(plain["id"], customizations=chosen(("size", "large"))))
        refused(reply, 422, "unknown_customization", "items[0].customizations[0].name")


async def test_choices_are_checked_when_the_items_of_an_order_change(restaurant: RestaurantRig) -> None:
    dish = await restaurant.dish(price=1_000, customizations=[SIZE])
    async with restaurant.client() as staff:
        placed = made(await staff.post("/api/orders", json=body(dish["id"], customizations=chosen(("size", "large")))))
        url = f"/api/orders/{placed['id']}"
        refused(await staff.put(url, json=body(dish["id"])), 422, "customization_count", "items[0].customizations")
        changed = expect(await staff.put(url, json=body(dish["id"], customizations=chosen(("size", "regular")))))
    assert (changed["version"], changed["subtotal"]) == (2, 1_000)


async def set_availability(client: httpx.AsyncClient, dishes: list[str], available: bool) -> dict[str, str]:
    body = {"menu_item_ids": dishes, "is_available": available}
    found = expect(await client.post("/api/menu/availability", json=body))
    return {one["id"]: one["outcome"] for one in found}


async def test_dishes_made_unavailable_in_one_call_cannot_be_ordered_from_then_on(restaurant: RestaurantRig) -> None:
    dishes = [(await restaurant.dish())["id"] for _ in range(12)]
    sold_out, left = dishes[:11], dishes[11]
    async with restaurant.client() as staff, restaurant.client(Role.CUSTOMER, session="guest") as guest:
        placed = made(await guest.post("/api/orders", json=body(*dishes)))
        assert await set_availability(staff, [*sold_out, sold_out[0]], False) == dict.fromkeys(sold_out, "changed")
        for place, dish in enumerate(sold_out):
            reply = await guest.post("/api/orders", json=body(left, dish))
            refused(reply, 422, "menu_item_unavailable", "items[1].menu_item_id")
            shown = expect(await guest.get(f"/api/menu/{dish}"))
            assert (shown["is_available"], shown["price"]) == (False, 1_000), place
        made(await guest.post("/api/orders", json=body(left)))
        assert expect(await guest.get(f"/api/orders/{placed['id']}"))["items"] == placed["items"]
        assert await set_availability(staff, sold_out, False) == dict.fromkeys(sold_out, "unchanged")
        assert set((await set_availability(staff, dishes, True)).values()) == {"changed", "unchanged"}
        made(await guest.post("/api/orders", json=body(*dishes)))
        refused(await guest.post("/api/menu/availability", json={}), 403, "forbidden")


@pytest.fixture
async def without_broker(system: System) -> AsyncIterator[str]:
    """Yields the URL of a second orders instance that cannot reach RabbitMQ and therefore reads no log."""
    port, unused_port = find_free(2)
    system.urls["mute"] = f"http://127.0.0.1:{port}"
    system.start(
        "orders", alias="mute", instance=3, orders_port=port, rabbitmq_url=f"amqp://x:x@127.0.0.1:{unused_port}/"
    )
    try:
        await system.ready("mute")
        yield system.urls["mute"]
    finally:
        await system.stop("mute")
        del system.urls["mute"]


async def test_instance_prices_by_its_own_menu_changes_without_waiting_for_the_log(
    restaurant: RestaurantRig, without_broker: str
) -> None:
    headers = {"Authorization": f"Bearer {restaurant.token}"}
    async with http_client(base_url=without_broker, headers=headers, timeout=10.0) as admin:
        dish = {"name": "Dosa", "price": 1_000, "category": "Mains"}
        dishes = [made(await admin.post("/api/menu", json=dish))["id"] for _ in range(3)]
        assert made(await admin.post("/api/orders", json=body(*dishes)))["durability"] == "journal"
        assert await set_availability(admin, dishes[:2], False) == dict.fromkeys(dishes[:2], "changed")
        for place in range(2):
            reply = await admin.post("/api/orders", json=body(dishes[2], dishes[place]))
            refused(reply, 422, "menu_item_unavailable", "items[1].menu_item_id")
        expect(await admin.put(f"/api/menu/{dishes[2]}", json={"price": 1_234}))
        assert made(await admin.post("/api/orders", json=body(dishes[2])))["subtotal"] == 1_234


async def test_unknown_dish_leaves_the_availability_of_all_dishes_unchanged(restaurant: RestaurantRig) -> None:
    dish, deleted = (await restaurant.dish())["id"], (await restaurant.dish())["id"]
    async with restaurant.client() as staff, restaurant.client(Role.ADMIN) as admin:
        expect(await admin.delete(f"/api/menu/{deleted}"))
        for wrong in (str(uuid4()), deleted):
            request = {"menu_item_ids": [dish, wrong], "is_available": False}
            reply = await staff.post("/api/menu/availability", json=request)
            refused(reply, 422, "unknown_menu_item", "menu_item_ids[1]")
        assert expect(await staff.get(f"/api/menu/{dish}"))["version"] == 1


async def test_concurrent_changes_of_availability_and_price_keep_both(restaurant: RestaurantRig) -> None:
    dish = (await restaurant.dish())["id"]
    async with restaurant.client() as staff, restaurant.client(Role.ADMIN) as admin:

        async def take_off() -> str:
            return (await set_availability(staff, [dish], False))[dish]

        async def change(**fields: Any) -> None:
            async def send() -> httpx.Response:
                return await admin.put(f"/api/menu/{dish}", json=fields)

            expect(await eventually(send, what=str(fields), until=lambda reply: reply.status_code != 409))

        # A request that loses its claim several times in a row is refused, and the caller retries.
        taken_off, *_ = await asyncio.gather(
            eventually(take_off, what="an unavailable dish", until=lambda outcome: outcome != "version_conflict"),
            change(price=1_500),
            change(description="hot"),
        )
        assert taken_off == "changed"
        seen = expect(await staff.get(f"/api/menu/{dish}"))
    assert (seen["is_available"], seen["price"], seen["description"], seen["version"]) == (False, 1_500, "hot", 4)
